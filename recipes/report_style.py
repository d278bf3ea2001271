"""How the page of `stagewise report` looks, on a screen, a telephone and paper."""

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark; --line: #ddd; --soft: #f5f6f8; --text: #1a1c20; --dim: #5c6370;
  --page: #fff; --warn: #a33; --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --line: #3a3f47; --soft: #22252b; --text: #e6e8eb;
  --dim: #9aa3b0; --page: #17191d; --warn: #f08080; --mark: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 22px 28px 60px; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 40px 0 6px; padding-top: 10px; border-top: 1px solid var(--line); }
p { margin: 6px 0; max-width: 88ch; } .dim { color: var(--dim); } .warn { color: var(--warn); }
.verdict { font-size: 18px; line-height: 1.45; margin: 14px 0; padding: 10px 16px;
  border-left: 4px solid var(--mark); background: var(--soft); max-width: none; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 10px 0; }
dt { color: var(--dim); } dd { margin: 0; }
ul { margin: 6px 0; padding-left: 20px; max-width: 88ch; } li { margin: 3px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px;
  margin: 14px 0; }
.tile { background: var(--soft); border: 1px solid var(--line); border-radius: 8px;
  padding: 8px 14px; }
.tile b { display: block; font-size: 18px; font-variant-numeric: tabular-nums; }
.tile span { color: var(--dim); font-size: 13px; }
.row { display: grid; gap: 16px; margin: 12px 0;
  grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }
figure { margin: 0; } figcaption { font-size: 14px; margin-top: 4px; max-width: 88ch; }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; background: #fff;
  border: 1px solid var(--line); }
.wide { overflow-x: auto; }
.wide td:first-child { position: sticky; left: 0; background: var(--page); }
table { border-collapse: collapse; margin: 8px 0; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { text-align: left; padding: 4px 16px 4px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td.number, th.number { text-align: right; } td.number { white-space: nowrap; }
pre { background: var(--soft); padding: 12px; font-size: 12px; line-height: 1.4;
  white-space: pre-wrap; columns: 2 320px; }
code { font-size: 0.93em; }
@media (max-width: 600px) { body { padding: 14px 14px 40px; } dl { grid-template-columns: 1fr; }
  dt { margin-top: 6px; } .verdict { font-size: 16px; }
  table { font-size: 13px; } th, td { padding-right: 8px; } td.number { white-space: normal; } }
@page { margin: 14mm; }
@media print { :root { color-scheme: light; --line: #ccc; --soft: #f5f6f8; --text: #000;
  --dim: #444; --page: #fff; --warn: #a00; --mark: #0072b2; }
  body { padding: 0; max-width: none; font-size: 10pt; }
  h2 { margin-top: 20px; break-after: avoid; } figure, tr, .tile, .verdict { break-inside: avoid; }
  .row { grid-template-columns: 1fr 1fr; } img { max-height: 200mm; } .wide { overflow: visible; }
  .tiles { grid-template-columns: repeat(3, 1fr); } figcaption { font-size: 9pt; }
  table { font-size: 8.5pt; } th, td { padding-right: 10px; } pre { font-size: 7.5pt; } }
"""
