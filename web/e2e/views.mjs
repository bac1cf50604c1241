// The views in a browser: node e2e/views.mjs FOLDER, where FOLDER holds what tests/views/gallery.py writes.
// Prints {claim: "" or what went wrong} as JSON; tests/views/test_browser.py makes a test of each.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import path from "node:path";
import { launch, open, view } from "./browser.mjs";

const folder = path.resolve(process.argv[2]);
const file = (name) => path.join(folder, name);
const axe = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const KINDS = ["tokens", "lens", "attention", "grid", "contributions", "circuit", "curves", "neuron", "traces", "anatomy", "table"];
const browser = await launch();
const tool = (shown, name) => shown.getByRole("toolbar").getByRole("button", { name });
const heat = (shown, n = 0) => shown.getByRole("application").nth(n);
const tip = (page) => page.locator(".tip");

async function serious(page) {
  await page.evaluate(axe);
  const found = await page.evaluate(async () => (await globalThis.axe.run(document, { runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"] })).violations);
  return found.filter((v) => ["serious", "critical"].includes(v.impact)).map((v) => `${v.id}: ${v.nodes.slice(0, 3).map((n) => `${n.target.flat().join(" ")} ${n.failureSummary?.split("\n")[1] ?? ""}`).join(" | ")}`);
}

const claims = {
  async "every kind of view comes to life and nothing goes wrong"() {
    const page = await open(browser, file("gallery.html"));
    for (const kind of KINDS) assert.ok(await view(page, kind).locator("h3").isVisible(), kind);
    assert.equal(await page.locator('[data-pellucid="failed"]').count(), 0);
    return page;
  },
  async "no view asks the network for anything and the page may not"() {
    const page = await open(browser, file("gallery.html"), { offline: true });
    const policy = await page.locator('meta[http-equiv="Content-Security-Policy"]').getAttribute("content");
    assert.match(policy, /default-src 'none'/);
    for (const kind of KINDS) await view(page, kind).locator("h3").scrollIntoViewIfNeeded();
    return page;
  },
  async "pointing at a token tells its numbers"() {
    const page = await open(browser, file("gallery.html"));
    await view(page, "tokens").getByRole("option").nth(2).hover();
    assert.match(await tip(page).innerText(), /Tower[\s\S]*integrated gradients[\s\S]*occlusion/);
    await view(page, "tokens").locator("h3").hover();
    assert.equal(await tip(page).count(), 0);
    return page;
  },
  async "arrow keys walk a grid and say each cell aloud"() {
    const page = await open(browser, file("gallery.html"));
    const grid = view(page, "grid");
    await heat(grid).focus();
    await page.keyboard.press("Home");
    await page.keyboard.press("ArrowRight");
    const said = grid.locator('[role="status"]').filter({ hasText: "Eiffel" });
    assert.match(await said.innerText(), /layer 11.*Eiffel.*95% interval/);
    await page.keyboard.press("ArrowUp");
    assert.match(await grid.locator('[role="status"]').filter({ hasText: "Eiffel" }).innerText(), /layer 10/);
    return page;
  },
  async "a token selected with the keyboard is selected in every view"() {
    const page = await open(browser, file("gallery.html"));
    await view(page, "tokens").getByRole("option").first().focus();
    await page.keyboard.press("ArrowRight");
    await page.keyboard.press("Enter");
    assert.deepEqual(await page.evaluate(() => ({ ...pellucid.page.place })), { position: 1, token: " Eiffel" });
    for (const kind of ["attention", "traces"]) assert.equal(await view(page, kind).locator('[role="option"][aria-selected="true"]').first().getAttribute("data-i"), "1", kind);
    await page.keyboard.press("Enter");
    assert.equal(await page.evaluate(() => pellucid.page.place), null);
    return page;
  },
  async "a head selected in the grid of heads is shown by attention, the table and the circuit"() {
    const page = await open(browser, file("gallery.html"));
    await page.evaluate(() => pellucid.page.select("layers.2.attn.heads.1"));
    await view(page, "attention").getByRole("heading", { name: "head 2.1" }).waitFor();
    assert.equal(await view(page, "circuit").locator('[role="option"][aria-selected="true"]').count(), 1);
    assert.equal((await view(page, "table").locator("tr.on").innerText()).split(/\s/)[0], "2.1");
    await view(page, "attention").getByRole("button", { name: "next head" }).click();
    assert.equal(await page.evaluate(() => pellucid.page.component), "layers.2.attn.heads.2");
    return page;
  },
  async "a click on a cell selects its component and its token"() {
    const page = await open(browser, file("gallery.html"));
    await heat(view(page, "grid")).click({ position: { x: 130, y: 60 } });
    const chosen = await page.evaluate(() => [pellucid.page.component, pellucid.page.place?.token]);
    assert.match(chosen[0], /^layers\.\d+\.resid_pre$/);
    assert.equal(chosen[1], " Eiffel");
    return page;
  },
  async "pointing at a token shows where the head looks from there"() {
    const page = await open(browser, file("gallery.html"));
    const shown = view(page, "attention"), option = shown.getByRole("option");
    await option.nth(4).hover();
    assert.match(await option.nth(3).innerText(), /(9\d(\.\d)?|100)%/); // the head shown first looks at the token before
    await shown.getByRole("button", { name: "looked at by" }).click();
    await option.nth(4).hover();
    assert.match(await option.nth(5).innerText(), /(9\d(\.\d)?|100)%/);
    return page;
  },
  async "of an encoder-decoder all three attentions can be chosen, and a head selected elsewhere brings its own"() {
    const page = await open(browser, file("spoken.html"));
    const shown = view(page, "attention");
    await shown.getByRole("heading", { name: "decoder cross head 0." }).waitFor();
    await shown.getByRole("button", { name: "encoder", exact: true }).click();
    await shown.getByRole("heading", { name: /^encoder head/ }).waitFor();
    assert.equal(await shown.getByRole("option").count(), 9);
    await page.evaluate(() => pellucid.page.select("decoder.layers.0.attn.heads.2"));
    await shown.getByRole("heading", { name: "decoder head 0.2" }).waitFor();
    assert.equal(await shown.getByRole("button", { name: "decoder", exact: true }).getAttribute("aria-pressed"), "true");
    assert.deepEqual(await serious(await open(browser, file("spoken.html"), { bypassCSP: true })), []);
    await tool(shown, "Table").click();
    assert.ok((await shown.locator("figure tbody tr").count()) > 20);
    return page;
  },
  async "a role leads from one of its heads to the next"() {
    const page = await open(browser, file("gallery.html"));
    const shown = view(page, "attention"), role = shown.getByRole("button", { name: /^induction: 2 heads/ });
    await role.click();
    await shown.getByRole("heading", { name: "head 2.1, induction" }).waitFor();
    await role.click();
    await shown.getByRole("heading", { name: "head 4.5, induction" }).waitFor();
    assert.equal(await page.evaluate(() => pellucid.page.component), "layers.4.attn.heads.5");
    return page;
  },
  async "each layer of a trace has its threshold and its curve"() {
    const page = await open(browser, file("gallery.html"));
    const shown = view(page, "traces");
    await shown.getByRole("heading", { name: /How well layer 5 tells apart: area 0\.857/ }).waitFor();
    await page.evaluate(() => pellucid.page.select("layers.2.resid_post"));
    await shown.getByRole("heading", { name: /How well layer 2 tells apart: area 0\.75/ }).waitFor();
    await shown.getByLabel("Threshold of layer 2").fill("-9");
    assert.match(await shown.locator("output").innerText(), /: 9 of 9 tokens/);
    await shown.getByRole("button", { name: "as measured" }).click();
    assert.match(await shown.locator("output").innerText(), /^\+1\.00/);
    return page;
  },
  async "names given in a circuit are in the document that is saved"() {
    const page = await open(browser, file("gallery.html"));
    const shown = view(page, "circuit"), boxes = shown.getByRole("option");
    await boxes.nth(1).click();
    await boxes.nth(2).click({ modifiers: ["Shift"] });
    await shown.getByLabel(/^Name for/).fill("movers");
    await shown.getByRole("button", { name: "Group" }).click();
    await tool(shown, "Save").click();
    const [download] = await Promise.all([page.waitForEvent("download"), shown.getByRole("button", { name: "JSON", exact: true }).click()]);
    const saved = JSON.parse(await readFile(await download.path()));
    assert.equal(saved.data.nodes.filter((n) => n.group === "movers").length, 2);
    const before = await boxes.count();
    await page.evaluate((d) => { const place = document.createElement("div"); place.id = "again"; document.body.append(place); pellucid.mount(place, d); }, saved);
    const again = page.locator("#again").getByRole("option");
    await again.first().waitFor();
    assert.equal(await again.count(), before);
    await tool(shown, "Full screen").click();
    await page.waitForFunction(() => document.fullscreenElement !== null);
    return page;
  },
  async "a word pinned in the lens is followed through the layers"() {
    const page = await open(browser, file("gallery.html"));
    const lens = view(page, "lens");
    await lens.getByLabel("Pin").selectOption(" Rome");
    assert.ok(await lens.getByText("probability of ␣Rome").first().isVisible());
    await lens.getByRole("button", { name: "KL" }).click();
    assert.ok(await lens.getByText(/KL from the model/).first().isVisible());
    await lens.getByRole("button", { name: "tuned" }).click();
    await heat(lens).focus();
    await page.keyboard.press("Enter");
    assert.ok(await lens.getByText(/probability of /).first().isVisible());
    return page;
  },
  async "fewer edges leave fewer parts, and named parts become one"() {
    const page = await open(browser, file("gallery.html"));
    const shown = view(page, "circuit"), boxes = shown.getByRole("option"), before = await boxes.count();
    await shown.getByLabel("Strongest edges").fill("12");
    const few = await boxes.count();
    assert.ok(few < before && few > 2, `${few} of ${before}`);
    await boxes.nth(1).click();
    await boxes.nth(2).click({ modifiers: ["Shift"] });
    await shown.getByLabel(/^Name for/).fill("movers");
    await shown.getByRole("button", { name: "Group" }).click();
    assert.equal(await boxes.count(), few - 1);
    return page;
  },
  async "every view has a table that sorts and filters"() {
    const page = await open(browser, file("gallery.html"));
    for (const kind of KINDS.slice(0, -1)) {
      await tool(view(page, kind), "Table").click();
      assert.ok((await view(page, kind).locator("figure tbody tr").count()) > 2, kind);
    }
    const table = view(page, "table");
    await table.getByRole("button", { name: "effect" }).click();
    assert.equal(await table.locator('th[aria-sort="descending"]').innerText().then((t) => t.includes("effect")), true);
    await table.getByLabel("Find").fill("<SCRIPT>");
    const left = await table.locator("figure tbody tr").allInnerTexts();
    assert.ok(left.length > 0 && left.length < 20 && left.every((row) => row.includes("<script>")), String(left));
    return page;
  },
  async "the code corner has the Python and the command line, the source corner the provenance"() {
    const page = await open(browser, file("gallery.html"));
    for (const kind of KINDS) {
      await tool(view(page, kind), "Code").click();
      assert.match(await view(page, kind).locator("pre").first().innerText(), /import pellucid/);
      assert.match(await view(page, kind).locator("pre").nth(1).innerText(), /^pellucid report/);
      await tool(view(page, kind), "Source").click();
      assert.match(await view(page, kind).locator("dl").innerText(), /seed/);
    }
    return page;
  },
  async "every view can be taken along as picture, drawing, table and document"() {
    let page;
    for (const kind of KINDS) {
      await page?.context().close(); // Chromium stops a page that starts many downloads
      page = await open(browser, file("gallery.html"));
      const shown = view(page, kind);
      await tool(shown, "Save").click();
      for (const what of ["PNG", "SVG", "CSV", "JSON"]) {
        const [download] = await Promise.all([
          page.waitForEvent("download", { timeout: 8000 }).catch(async () => assert.fail(`${kind} ${what}: ${await shown.locator('[role="status"]').allInnerTexts()}`)),
          shown.getByRole("button", { name: what, exact: true }).click(),
        ]);
        const bytes = await readFile(await download.path());
        const start = { PNG: "89504e47", SVG: "3c737667" }[what];
        if (start) assert.equal(bytes.subarray(0, 4).toString("hex"), start, `${kind} ${what}`);
        if (what === "JSON") assert.equal(JSON.parse(bytes)["pellucid-view"], 1);
        assert.ok(bytes.length > 60, `${kind} ${what}`);
        if (what === "SVG") assert.equal(await page.evaluate((t) => new DOMParser().parseFromString(t, "image/svg+xml").querySelector("parsererror")?.textContent ?? "", bytes.toString()), "", `${kind} is no XML`);
      }
    }
    return page;
  },
  async "what prompts, tokens, titles and names contain is shown, never run"() {
    const page = await open(browser, file("nasty.html"));
    for (const kind of KINDS) {
      const shown = view(page, kind);
      assert.match(await shown.locator("h3").innerText(), /<\/script><script>alert\(3\)/, kind);
      await tool(shown, "Code").click();
      await tool(shown, "Source").click();
      if (kind !== "table") await tool(shown, "Table").click();
    }
    assert.equal(await page.locator("script:not([type='application/json'])").count(), 1);
    assert.ok(await view(page, "table").locator("td", { hasText: "<script>" }).first().isVisible());
    return page;
  },
  async "light theme has no serious finding of axe"() { return accessible("light", false); },
  async "dark theme has no serious finding of axe"() { return accessible("dark", false); },
  async "tables have no serious finding of axe in both themes"() { await (await accessible("light", true)).context().close(); return accessible("dark", true); },
  async "the theme follows the system and the button"() {
    const page = await open(browser, file("gallery.html"), { theme: "dark" });
    assert.equal(await view(page, "grid").getAttribute("data-theme"), "dark");
    await page.getByRole("button", { name: "Light or dark" }).click();
    await page.waitForFunction(() => document.querySelector("[data-pellucid]").dataset.theme === "light");
    return page;
  },
  async "a narrow page scrolls only downwards"() {
    const page = await open(browser, file("gallery.html"), { width: 360, height: 740 });
    assert.ok((await page.evaluate(() => document.documentElement.scrollWidth)) <= 360);
    await view(page, "tokens").getByRole("option").nth(3).hover();
    const box = await tip(page).boundingBox();
    assert.ok(box.x >= 0 && box.x + box.width <= 360);
    return page;
  },
  async "two outputs of a notebook load the views once and follow one another, without a kernel"() {
    const page = await open(browser, file("notebook.html"), { offline: true });
    await view(page, "attention").locator("h3").waitFor();
    assert.equal(await page.locator("script[type='module']").count(), 1);
    assert.equal(await view(page, "grid").getAttribute("data-theme"), "dark"); // as the notebook says
    await heat(view(page, "grid")).focus();
    await page.keyboard.press("Home");
    await page.keyboard.press("Enter");
    await view(page, "attention").getByRole("heading", { name: "head 5.0" }).waitFor();
    return page;
  },
  async "a notebook saved as a page shows every output offline and loads the views once"() {
    const page = await open(browser, file("saved.html"), { offline: true });
    await view(page, "lens").locator("h3").waitFor();
    assert.equal(await page.locator("[data-pellucid='live']").count(), 3);
    assert.equal(await page.locator("script[type='module']").count(), 1);
    await page.evaluate(() => pellucid.page.select("layers.4.attn.heads.5"));
    await view(page, "attention").getByRole("heading", { name: "head 4.5" }).waitFor();
    const wrong = page.wrong;
    const plain = await open(browser, file("saved.html"), { javaScriptEnabled: false });
    assert.ok((await plain.getByRole("table").count()) >= 3);
    assert.ok(await plain.getByText("Scripts are off here").first().isVisible());
    plain.wrong.push(...wrong);
    return plain;
  },
  async "without scripts a view is a title and a note or a table, not a blank"() {
    const page = await open(browser, file("gallery.html"), { javaScriptEnabled: false });
    assert.ok(await page.getByText("When does the answer appear?").isVisible());
    assert.ok(await page.getByRole("row").nth(2).isVisible());
    return page;
  },
  async "a prompt of 512 tokens can be walked in every view"() {
    const page = await open(browser, file("long.html"));
    for (const kind of ["lens", "grid", "traces"]) {
      const shown = view(page, kind);
      await heat(shown).focus();
      await page.keyboard.press("End");
      await page.locator(".tip", { hasText: "w511" }).waitFor();
      await page.keyboard.press("Escape");
    }
    await view(page, "tokens").getByRole("option").nth(500).hover();
    assert.match(await tip(page).innerText(), /w500/);
    const heads = view(page, "attention");
    assert.match(await heads.getByRole("heading", { name: /heads$/ }).innerText(), /All heads$/); // none is left out
    await heads.getByRole("button", { name: "next head" }).click();
    await heads.getByRole("option").nth(500).hover();
    assert.match(await heads.getByRole("option").nth(0).innerText(), /w0/);
    const nodes = await page.evaluate(() => { const count = (n) => [...n.querySelectorAll("*")].reduce((s, e) => s + 1 + (e.shadowRoot ? count(e.shadowRoot) : 0), 0); return count(document); });
    assert.ok(nodes < 20000, `${nodes} elements`);
    return page;
  },
  async "a host can exchange the document and hear of the selection"() {
    const page = await open(browser, file("gallery.html"));
    const heard = await page.evaluate(() => {
      const given = [...document.querySelectorAll("[data-pellucid] > script")].map((s) => JSON.parse(s.textContent));
      const place = document.createElement("div");
      document.body.append(place);
      const shown = pellucid.mount(place, given[0]);
      const said = [];
      const stop = pellucid.page.onselect(() => said.push(pellucid.page.component));
      pellucid.page.select("layers.1.mlp.out");
      stop();
      pellucid.page.select("layers.2.mlp.out");
      shown.update({ ...given[0], title: "Exchanged" });
      return new Promise((done) => setTimeout(() => {
        const title = place.shadowRoot.querySelector("h3").textContent;
        shown.remove();
        let refused = "";
        try { pellucid.mount(place, { ...given[0], "pellucid-view": 99 }); } catch (error) { refused = error.message; }
        done({ said, title, left: place.shadowRoot.childElementCount, refused });
      }, 50));
    });
    assert.deepEqual(heard.said, ["layers.1.mlp.out"]);
    assert.equal(heard.title, "Exchanged");
    assert.equal(heard.left, 0);
    assert.match(heard.refused, /version 99/);
    return page;
  },
  async "the report's views follow one another, and its words need no script"() {
    const page = await open(browser, file("report.html"), { offline: true });
    const views = page.locator("[data-pellucid='live']");
    assert.ok((await views.count()) >= 8, `${await views.count()} views`);
    await heat(view(page, "grid")).focus();
    await page.evaluate(() => pellucid.page.select("layers.1.attn.heads.1"));
    await view(page, "attention").getByRole("heading", { name: "head 1.1" }).waitFor();
    const wrong = page.wrong;
    const plain = await open(browser, file("report.html"), { javaScriptEnabled: false });
    assert.ok((await plain.locator("#findings li").count()) >= 3);
    assert.ok(await plain.getByText("How far can this be trusted?").isVisible());
    plain.wrong.push(...wrong);
    return plain;
  },
  async "the report has no serious finding of axe in both themes, and fits a narrow page"() {
    for (const theme of ["light", "dark"]) {
      const page = await open(browser, file("report.html"), { theme, bypassCSP: true });
      assert.deepEqual(await serious(page), []);
    }
    const page = await open(browser, file("report.html"), { width: 360, height: 740 });
    assert.ok((await page.evaluate(() => document.documentElement.scrollWidth)) <= 360);
    return page;
  },
  async "a notebook's widget tells its kernel what is selected, and selects what the kernel says"() {
    const page = await open(browser, file("gallery.html"), { bypassCSP: true });
    const heard = await page.evaluate(async () => {
      const text = document.querySelector("script[type='module']").textContent;
      const { default: widget } = await import(URL.createObjectURL(new Blob([text], { type: "text/javascript" })));
      const kept = Object.assign(document.createElement("div"), { innerHTML: "plain view" });
      kept.dataset.pellucidInstead = "abc";
      document.body.append(kept);
      const values = { document: document.querySelectorAll("[data-pellucid] > script")[4].textContent, component: "", position: -1, instead: "abc" }, on = {};
      let saved = 0;
      const model = { get: (k) => values[k], set: (k, v) => { values[k] = v; }, save_changes: () => { saved++; }, on: (k, f) => { on[k] = f; } };
      const el = document.createElement("div");
      document.body.append(el);
      const remove = widget.render({ model, el });
      await new Promise((done) => setTimeout(done, 100));
      const shown = el.shadowRoot.querySelector("[role='application']");
      shown.dispatchEvent(new KeyboardEvent("keydown", { key: "Home", bubbles: true }));
      shown.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true }));
      const clicked = values.component;
      values.component = "layers.3.attn.heads.4";
      on["change:component"]();
      const follows = values.component, hidden = kept.hidden, shared = pellucid.page.component;
      pellucid.page.select("layers.1.attn.heads.1");
      const told = values.component;
      remove();
      return { clicked, follows, hidden, shared, told, back: !kept.hidden, saved, left: el.shadowRoot.childElementCount };
    });
    assert.deepEqual(heard, { clicked: "layers.5.attn.heads.0", follows: "layers.3.attn.heads.4", hidden: true, shared: "layers.3.attn.heads.4", told: "layers.1.attn.heads.1", back: true, saved: 3, left: 0 });
    return page;
  },
  async "paper gets no buttons, and nothing moves where motion is unwanted"() {
    const page = await open(browser, file("gallery.html"), { reducedMotion: "reduce" });
    assert.match(await tool(view(page, "grid"), "Code").evaluate((e) => getComputedStyle(e).transitionDuration), /^0s/);
    await page.emulateMedia({ media: "print" });
    assert.equal(await tool(view(page, "grid"), "Code").isVisible(), false);
    return page;
  },
};

async function accessible(theme, asTables) {
  const page = await open(browser, file("gallery.html"), { theme, bypassCSP: true });
  await view(page, "anatomy").getByRole("button", { name: /^layer 2:/ }).click();
  await page.evaluate(() => pellucid.page.select("layers.2.attn.heads.1", { position: 1, token: " Eiffel" }));
  for (const kind of KINDS) {
    await tool(view(page, kind), "Code").click();
    if (asTables && kind !== "table") await tool(view(page, kind), "Table").click();
  }
  assert.deepEqual(await serious(page), []);
  return page;
}

const found = {};
const only = process.argv[3];
for (const [claim, check] of Object.entries(claims)) {
  if (only && !claim.includes(only)) continue;
  let page;
  try {
    page = await check();
    assert.deepEqual(page.wrong, []);
    found[claim] = "";
  } catch (error) {
    found[claim] = String(error?.message ?? error).slice(0, 1500);
  }
  for (const context of browser.contexts()) await context.close();
}
await browser.close();
console.log(JSON.stringify(found, null, 1));
