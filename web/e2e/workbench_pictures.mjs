// The pictures of the documentation: node e2e/workbench_pictures.mjs ADDRESS FOLDER, with the workbench on SmolLM2 at ADDRESS.
import path from "node:path";
import { launch } from "./browser.mjs";

const [address, folder] = process.argv.slice(2);
const browser = await launch();

async function shot(name, { width, height, theme }, before) {
  const context = await browser.newContext({ viewport: { width, height }, colorScheme: theme });
  const page = await context.newPage();
  page.on("pageerror", (error) => { throw error; });
  await page.goto(address);
  await page.locator("[data-view=lens] figure").waitFor();
  await page.getByRole("button", { name: "Compare with a second prompt" }).click();
  await page.locator("#other-a").fill("The capital of Italy is");
  await page.locator("#part-a").fill("layers.23.attn.heads.4");
  await page.locator("#part-a").press("Enter");
  await before(page);
  await page.waitForFunction(() => !document.querySelector(".wait.busy, [aria-busy=true]"));
  await page.waitForTimeout(800);
  await page.screenshot({ path: path.join(path.resolve(folder), `${name}.png`) });
  await context.close();
}
const button = (page, name) => page.getByRole("button", { name, exact: true });
const changed = (page) => page.locator("table[aria-label^=Answers]").nth(1).waitFor();

await shot("workbench", { width: 1360, height: 860, theme: "light" }, async (page) => {
  await button(page, "Zero").click();
  await changed(page);
  await page.getByRole("combobox", { name: /Go on for/ }).selectOption("8");
  await page.waitForFunction(() => [...document.querySelectorAll("[aria-label='how it goes on']")].every((e) => e.textContent.length > 3));
});
await shot("workbench-views", { width: 1360, height: 860, theme: "dark" }, async (page) => {
  await page.evaluate(() => globalThis.pellucid.page.select("layers.12.resid_post", { position: 3, token: " France" }, false));
  await page.getByRole("checkbox", { name: /^only at/ }).check();
  await button(page, "Steer").click();
  await changed(page);
  await page.getByRole("slider", { name: /^Strength/ }).fill("1");
  await page.evaluate(() => globalThis.pellucid.page.select("layers.23.attn.heads.4", null, false));
  for (const name of ["Lens", "Attention", "Neurons"]) await button(page, name).click();
  await page.locator("[data-view=neurons] td.meter").first().waitFor();
  await page.locator("[data-view=attention] figure").waitFor();
  await page.evaluate(() => scrollTo(0, 0));
});
await shot("workbench-narrow", { width: 360, height: 740, theme: "dark" }, async (page) => {
  await button(page, "Scale").click();
  await changed(page);
  await page.evaluate(() => scrollTo(0, 90));
});
await browser.close();
