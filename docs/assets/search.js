// Goes before the theme's search worker, which looks for words that begin with each word of a query: the "how do I" of a
// question would find nearly everything. Words that say nothing are left out, unless there are no others.
addEventListener("message", ({ data: message }) => {
  if (typeof message.data !== "string") return; // the index
  const words = message.data.split(/[\s?]+/);
  const telling = words.filter((word) => word && lunr.stopWordFilter(word.toLowerCase()));
  if (telling.length) message.data = telling.join(" ");
});
