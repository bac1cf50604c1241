// A look at the monitored chat on a real model, by keyboard alone: node e2e/real_chat.mjs ADDRESS FOLDER WIDTH THEME PROMPT [VECTOR]
import { createRequire } from "node:module";
import { readFile } from "node:fs/promises";
import { launch } from "./browser.mjs";
const [address, folder, width, theme, prompt, vector] = process.argv.slice(2);
const axe = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const browser = await launch();
const page = await (await browser.newContext({ viewport: { width: +width, height: 900 }, colorScheme: theme })).newPage();
page.setDefaultTimeout(170000);
const wrong = [];
page.on("pageerror", (e) => wrong.push(`error: ${e.message}`));
page.on("console", (m) => m.type() === "error" && wrong.push(`console: ${m.text()}`));
await page.goto(address);
await page.locator(".pane").first().waitFor();
// keyboard only: Tab to Chat, Enter; Tab to the text box
const at = () => page.evaluate(() => { const e = document.activeElement; return `${e.tagName} ${(e.getAttribute("aria-label") ?? e.labels?.[0]?.innerText ?? e.innerText ?? "").trim().slice(0, 50)}`; });
const path = [];
let steps = 0;
for (; steps < 80 && !/^BUTTON Chat/.test(await at()); steps++) await page.keyboard.press("Tab");
path.push(`Chat after ${steps} tabs`);
await page.keyboard.press("Enter");
const chat = page.locator('[data-pane="a"] [data-view="chat"]');
await chat.waitFor();
const order = [];
for (steps = 0; steps < 60 && !/^TEXTAREA/.test(await at()); steps++) { await page.keyboard.press("Tab"); order.push(await at()); }
path.push(`text box after ${steps} tabs: ${order.join(" > ")}`);
await page.keyboard.type(prompt);
const start = Date.now();
await page.keyboard.press("Enter");
const seen = [];
const state = chat.locator("p.state");
for (;;) {
  const n = await chat.evaluate((e) => [...e.querySelectorAll("div")].map((d) => d.shadowRoot?.querySelectorAll("circle").length ?? 0).reduce((a, b) => a + b, 0));
  if (n && n !== seen.at(-1)) seen.push(n);
  const said = await state.innerText().catch(() => "");
  if (/ended|Stopped|Replaced|stopped/.test(said)) break;
  if (Date.now() - start > 170000) { path.push("no end after 170 s"); break; }
  await page.waitForTimeout(100);
}
await page.waitForTimeout(500);
console.log(JSON.stringify({ width, theme, path, seen, seconds: (Date.now() - start) / 1000, state: await state.innerText().catch(() => ""), shown: await chat.locator("[data-shown]").last().innerText().catch(() => ""), perplexity: await chat.locator("[data-perplexity]").innerText().catch(() => "") }, null, 1));
const sideways = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
await page.evaluate(axe);
const found = await page.evaluate(async () => (await globalThis.axe.run(document, { runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"] })).violations);
console.log("scrolls sideways by", sideways, "; axe:", found.map((v) => `${v.impact} ${v.id} ${v.nodes[0].target}`).join("; ") || "nothing", "; errors:", wrong.join("; ") || "none");
await chat.scrollIntoViewIfNeeded();
await page.screenshot({ path: `${folder}/chat_${width}_${theme}.png`, fullPage: true });
if (vector) {
  await chat.getByLabel(/^Along /).selectOption(vector);
  const slider = chat.getByLabel("Strength");
  await slider.focus();
  for (let i = 0; i < 3; i++) await slider.press("ArrowRight");
  await page.waitForTimeout(1500);
  await state.filter({ hasText: /ended|Stopped|Replaced/ }).waitFor();
  await page.waitForTimeout(800);
  console.log("steered:", await chat.locator("[data-shown]").last().innerText(), "|", await chat.locator("[data-price]").innerText(), "|", await chat.locator("[data-perplexity]").innerText().catch(() => ""));
  await page.screenshot({ path: `${folder}/steered_${width}_${theme}.png`, fullPage: true });
}
await browser.close();
