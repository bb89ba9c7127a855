// The best two pages for each question (JSON on stdin), each by its best section, as the built site's search has them:
//     node docs/find.mjs build/site
import { readFileSync, readdirSync } from "node:fs";
import { createContext, runInContext } from "node:vm";

const site = process.argv[2];
const folder = `${site}/assets/javascripts/workers`;
const listeners = [];
let answer;
const worker = { console, addEventListener: (_, listener) => listeners.push(listener), postMessage: (m) => answer(m) };
worker.self = worker;
createContext(worker);
for (const name of readdirSync(folder)) {
  if (name.endsWith(".js")) runInContext(readFileSync(`${folder}/${name}`, "utf8"), worker);
}

function ask(type, data) {
  return new Promise((resolve) => {
    answer = resolve;
    const message = { data: { type, data } };
    for (const listener of listeners) listener(message);
  });
}

const [SETUP, QUERY] = [0, 2];
await ask(SETUP, { ...JSON.parse(readFileSync(`${site}/search/search_index.json`, "utf8")), options: {} });
const found = [];
for (const question of JSON.parse(readFileSync(0, "utf8"))) {
  const { items } = (await ask(QUERY, question)).data;
  found.push(items.slice(0, 2).map((page) => page[0].location));
}
console.log(JSON.stringify(found));
