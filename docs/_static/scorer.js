/* Pages before the names of methods that hold the word. */
var Scorer = {
  objNameMatch: 12, objPartialMatch: 1,
  objPrio: {0: 5, 1: 0, 2: -5}, objPrioDefault: 0,
  title: 15, partialTitle: 7,
  term: 5, partialTerm: 2,
};
