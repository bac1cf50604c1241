// The documentation site opened from disk with no network: node e2e/site.mjs FOLDER prints each claim and what failed.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import { chromium } from "playwright-core";

const folder = resolve(process.argv[2]), at = (page) => "file://" + join(folder, page);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const PAGES = ["index.html", "guide.html", "surgery.html", "architectures.html", "reference/causal.html", "search.html?q=patching"];
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox", "--allow-file-access-from-files"] });

async function opened(page, { width = 1200, theme = "light" } = {}) {
  const context = await browser.newContext({ viewport: { width, height: 900 }, colorScheme: theme, reducedMotion: "reduce" });
  const tab = await context.newPage(), foreign = [], errors = [];
  tab.on("request", (r) => { if (!/^(file|data|blob):/.test(r.url())) foreign.push(r.url()); });
  tab.on("requestfailed", (r) => { if (r.url().startsWith("file:")) errors.push(`not found: ${r.url()}`); });
  tab.on("pageerror", (e) => errors.push(String(e)));
  await tab.goto(at(page), { waitUntil: "load" });
  await tab.waitForTimeout(300);
  return { tab, foreign, errors, close: () => context.close() };
}

async function everywhere(check, options) {
  const wrong = [];
  for (const page of PAGES) {
    const shown = await opened(page, options);
    const found = await check(shown);
    if (found) wrong.push(`${page}: ${found}`);
    await shown.close();
  }
  return wrong.join("; ");
}

const seriously = (options) => everywhere(async ({ tab }) => {
  await tab.evaluate(axe);
  const { violations } = await tab.evaluate(() => axe.run({ resultTypes: ["violations"] }));
  return violations.filter((v) => ["serious", "critical"].includes(v.impact)).map((v) => `${v.id} at ${v.nodes[0].target} (${v.nodes.length})`).join(", ");
}, options);

const CLAIMS = {
  async "no page asks for anything outside its folder, nor misses a file of it"() {
    return everywhere(async ({ foreign, errors }) => [...foreign, ...errors].join(", "));
  },
  async "axe finds nothing serious in the light"() {
    return seriously({ theme: "light" });
  },
  async "axe finds nothing serious in the dark"() {
    return seriously({ theme: "dark" });
  },
  async "on a telephone no page is wider than the screen"() {
    return everywhere(async ({ tab }) => {
      const width = await tab.evaluate(() => document.documentElement.scrollWidth);
      return width > 360 ? `${width} pixels of 360` : "";
    }, { width: 360 });
  },
  async "search finds a technique by its name"() {
    const { tab, close } = await opened("search.html?q=path_patching");
    await tab.waitForSelector("#search-results li a", { timeout: 10000 });
    const found = await tab.$$eval("#search-results li a", (links) => links.map((a) => a.textContent));
    await close();
    return found.some((t) => t.includes("path_patching")) ? "" : `found ${found.slice(0, 5)}`;
  },
};

let failed = 0;
for (const [name, claim] of Object.entries(CLAIMS)) {
  let wrong;
  try { wrong = await claim(); } catch (error) { wrong = String(error); }
  console.log(`${wrong ? "FAILED" : "holds"}: ${name}${wrong ? `: ${wrong}` : ""}`);
  failed += Boolean(wrong);
}
await browser.close();
process.exit(failed ? 1 : 0);
