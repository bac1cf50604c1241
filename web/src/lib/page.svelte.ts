// What the views on one page share: what is selected, what is pointed at, and the theme.
import type { Theme } from "./colour";
import { related } from "./site";

/** A place in a text: views follow one another only where the same token stands at the same position. */
export interface Place { position: number; token: string }

export class Page {
  component: string | null = $state(null);
  place: Place | null = $state(null);
  hovered: { component: string | null; place: Place | null } = $state({ component: null, place: null });
  theme: Theme = $state("light");
  #listeners = new Set<() => void>();

  /** Select; selecting what is selected clears it. `undefined` leaves a part of the selection as it is. */
  select(component: string | null | undefined, place?: Place | null, toggle = true): void {
    const same = toggle && (component === undefined || component === this.component) && (place === undefined || samePlace(place, this.place));
    if (component !== undefined) this.component = same ? null : component;
    if (place !== undefined) this.place = same ? null : place;
    this.#listeners.forEach((each) => each());
  }

  hover(component: string | null, place: Place | null): void {
    this.hovered = { component, place };
  }

  /** 2 selected, 1 related to the selection, 0 neither. */
  isOn(component: string | undefined): 0 | 1 | 2 {
    return related(component, this.component);
  }

  isAt(position: number | undefined, token: string | undefined): boolean {
    return position !== undefined && this.place?.position === position && this.place.token === token;
  }

  isNear(position: number | undefined, token: string | undefined): boolean {
    const { place } = this.hovered;
    return position !== undefined && place?.position === position && place.token === token;
  }

  /** Called after every change of the selection, for hosts (a notebook's kernel, the workbench). */
  onselect(listener: () => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }
}

const samePlace = (a: Place | null, b: Place | null) => a?.position === b?.position && a?.token === b?.token;

/** The page's own theme: what a user chose, else what the host says, else what the system prefers. */
export function followTheme(page: Page): void {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const update = () => { page.theme = chosen() ?? (dark.matches ? "dark" : "light"); };
  dark.addEventListener("change", update);
  new MutationObserver(update).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
  if (document.body) new MutationObserver(update).observe(document.body, { attributes: true, attributeFilter: ["class", "data-jp-theme-light"] });
  update();
}

function chosen(): Theme | undefined {
  const { theme } = document.documentElement.dataset;
  if (theme === "light" || theme === "dark") return theme;
  const jupyter = document.body?.dataset.jpThemeLight;
  if (jupyter) return jupyter === "true" ? "light" : "dark";
  const classes = document.body?.classList;
  if (classes?.contains("vscode-dark") || classes?.contains("vscode-high-contrast")) return "dark";
  if (classes?.contains("vscode-light")) return "light";
  return undefined;
}
