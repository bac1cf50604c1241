// Chromium as Debian ships it, without any connection of its own.
import { chromium } from "playwright-core";

const ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];

export const launch = () => chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ARGS });

/** A page of a file; every request outside it and every error of the page is noted. */
export async function open(browser, file, { theme = "light", width = 1280, height = 900, ...more } = {}) {
  const context = await browser.newContext({ viewport: { width, height }, colorScheme: theme, acceptDownloads: true, ...more });
  const page = await context.newPage();
  page.wrong = [];
  page.on("pageerror", (e) => page.wrong.push(`error: ${e.message}`));
  page.on("console", (m) => { if (m.type() === "error") page.wrong.push(`console: ${m.text()}`); });
  page.on("dialog", (d) => { page.wrong.push(`dialog: ${d.message()}`); void d.dismiss(); });
  page.on("request", (r) => { if (!/^(file|data|blob):/.test(r.url())) page.wrong.push(`request: ${r.url()}`); });
  await page.goto(`file://${file}`);
  return page;
}

export const view = (page, kind) => page.locator(`[data-pellucid]:has(figure[data-kind="${kind}"])`).first();
