// The pictures of the documentation: node e2e/screenshots.mjs REPORT.html FOLDER
import path from "node:path";
import { launch, open, view } from "./browser.mjs";

const [report, folder] = process.argv.slice(2).map((p) => path.resolve(p));
const browser = await launch();
const shot = async (name, kind, how, before = async () => {}) => {
  const page = await open(browser, report, how);
  await page.waitForTimeout(400);
  await before(page);
  const target = kind ? view(page, kind) : page;
  await target.screenshot({ path: path.join(folder, `${name}.png`) });
  if (page.wrong.length) throw new Error(page.wrong.join("\n"));
  await page.context().close();
};

await shot("report", "", { width: 1180, height: 760 });
await shot("lens", "lens", { width: 900, height: 900 });
await shot("attention", "attention", { width: 1180, height: 900, theme: "dark" });
await shot("narrow", "", { width: 360, height: 740, theme: "dark" }, (page) => page.locator("#heads").scrollIntoViewIfNeeded());
await browser.close();
