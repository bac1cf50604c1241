// The hosts' side of the views: put a document into an element, follow the page's selection, take it away again.
//
//   const view = pellucid.mount(element, document)       one view; views on a page share pellucid.page
//   view.update(document); view.remove()
//   pellucid.page.select("layers.5.attn.heads.9"); pellucid.page.onselect(() => ...)
//
// A page that carries <div data-pellucid><script type="application/json">...</script></div> is brought to life by loading
// this module, and again by `pellucid.scan()` when more has been added. A kind of view is a row of `pellucid.kinds`; a view
// of a kind that has none keeps what it says without scripts.
import { flushSync, mount as create, unmount } from "svelte";
import base from "./base.css?inline";
import { kindOf, KINDS } from "./kinds";
import { followTheme, Page } from "./lib/page.svelte";
import type { Document } from "./schema";
import { VERSION } from "./schema";
import Live from "./Live.svelte";

export type { Document } from "./schema";
export { Page } from "./lib/page.svelte";
export type { Place } from "./lib/page.svelte";

export interface Mounted { update(document: Document): void; remove(): void }

export const page = new Page();

let sheet: CSSStyleSheet | undefined;

/** Show `document` in `element`, in a shadow root. Throws for a document of a version this library does not read. */
export function mount(element: HTMLElement, document: Document, shared: Page = page): Mounted {
  check(document);
  if (!sheet) {
    sheet = new CSSStyleSheet();
    sheet.replaceSync(base);
  }
  const root = element.shadowRoot ?? element.attachShadow({ mode: "open" });
  root.adoptedStyleSheets = [sheet];
  root.replaceChildren();
  const live = create(Live, { target: root, props: { document, page: shared, host: element } }) as { set(document: Document): void };
  flushSync();
  return {
    update(next) {
      check(next);
      live.set(next);
    },
    remove() {
      void unmount(live);
      root.replaceChildren();
    },
  };
}

function check(document: Document): void {
  const version = document?.["pellucid-view"];
  if (version !== VERSION) throw new Error(`this is a view of version ${version}, and this library reads version ${VERSION}`);
  if (!kindOf(document.data)) throw new Error(`this library has no view of kind ${document.data?.kind}`);
}

/** Views a notebook keeps for the time when there is no kernel, by the widget that shows the same as long as there is one. */
const replaced = new Set<string>();

/** Hide what the notebook keeps instead of a widget, now and whenever it is shown anew; the function brings it back. */
function takeover(id: string): () => void {
  const kept = () => document.querySelectorAll<HTMLElement>(`[data-pellucid-instead="${CSS.escape(id)}"]`);
  replaced.add(id);
  kept().forEach((each) => { each.hidden = true; });
  return () => {
    replaced.delete(id);
    kept().forEach((each) => { each.hidden = false; });
    scan();
  };
}

/** Bring every view written into the page to life. */
export function scan(within: ParentNode = document): void {
  for (const element of within.querySelectorAll<HTMLElement>("[data-pellucid]:not([data-pellucid='live'])")) {
    const text = element.querySelector(":scope > script[type='application/json']")?.textContent;
    if (!text || replaced.has(element.parentElement?.dataset.pellucidInstead ?? "")) continue;
    element.dataset.pellucid = "live";
    try {
      const document = JSON.parse(text);
      if (document["pellucid-view"] === VERSION && !kindOf(document.data)) element.dataset.pellucid = "plain"; // its numbers stand there already
      else mount(element, document);
    } catch (error) {
      element.dataset.pellucid = "failed";
      console.error(error);
      (element.shadowRoot ?? element).replaceChildren(`This view cannot be shown: ${(error as Error).message}`);
    }
  }
}

/** A button that changes the theme of the whole page. */
function themeSwitch(button: HTMLElement): void {
  button.hidden = false;
  button.addEventListener("click", () => { document.documentElement.dataset.theme = page.theme === "dark" ? "light" : "dark"; });
}

if (typeof document !== "undefined") {
  // a notebook may load this module several times (each widget brings it along): the first is the page's
  (globalThis as any).pellucid ??= { mount, scan, page, takeover, kinds: KINDS, version: VERSION };
  const start = () => {
    followTheme(page);
    document.querySelectorAll<HTMLElement>("[data-pellucid-theme]").forEach(themeSwitch);
    scan();
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
}

/** The widget of a notebook: the document and the selection live in the kernel as well. */
export default {
  render({ model, el }: { model: any; el: HTMLElement }) {
    const own = new Page(), host = (globalThis as any).pellucid;
    followTheme(own);
    const view = mount(el, JSON.parse(model.get("document")), own);
    const instead = model.get("instead"), back = instead ? host.takeover(instead) : () => {};
    // the page's other views belong to another copy of this module: what is selected there is told from one to the other
    const follow = (from: Page, to: Page) => from.onselect(() => {
      if (from.component !== to.component || from.place?.position !== to.place?.position) to.select(from.component, from.place, false);
    });
    const stops = [
      own.onselect(() => {
        model.set("component", own.component ?? "");
        model.set("position", own.place?.position ?? -1);
        model.save_changes();
      }),
      follow(own, host.page), follow(host.page, own),
    ];
    model.on("change:document", () => view.update(JSON.parse(model.get("document"))));
    model.on("change:component", () => {
      const component = model.get("component") || null;
      if (component !== own.component) own.select(component, undefined, false);
    });
    return () => { stops.forEach((stop) => stop()); view.remove(); back(); };
  },
};
