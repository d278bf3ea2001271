"""How the page of `stagewise report` looks."""

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark; --line: #ddd; --soft: #f5f6f8; --text: #1a1c20; --dim: #5c6370;
  --page: #fff; --warn: #a33; }
@media (prefers-color-scheme: dark) { :root { --line: #3a3f47; --soft: #22252b; --text: #e6e8eb;
  --dim: #9aa3b0; --page: #17191d; --warn: #f08080; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1360px; padding: 18px 28px 60px; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 18px; margin: 40px 0 6px; }
p { margin: 6px 0; max-width: 78ch; } .dim { color: var(--dim); }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 14px 0; }
.tile { background: var(--soft); border: 1px solid var(--line); border-radius: 8px;
  padding: 8px 14px; min-width: 150px; }
.tile b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; }
.tile span { color: var(--dim); font-size: 13px; }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); gap: 16px; }
.wide { max-width: 980px; } figure { margin: 0; } figcaption { color: var(--dim); font-size: 13px; }
img { width: 100%; height: auto; border-radius: 6px; border: 1px solid var(--line);
  background: #fff; }
table { border-collapse: collapse; margin: 8px 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td.number, th.number { text-align: right; }
pre { background: var(--soft); padding: 12px; overflow-x: auto; font-size: 13px; }
.warn { color: var(--warn); }
"""
