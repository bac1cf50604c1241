// Single keys, for those who do not want to reach for the mouse. They are silent while one types, and can be switched off.
import { PANELS } from "./views";

export const KEYS: readonly [key: string, says: string][] = [
  ["/", "to the prompt"], ["n", "to the next pane"], ["c", "choose a part by name"], ["b", "all edits off, or on again"],
  ["j", "to the jobs"], ["w", "workspaces: save, open, export"], ["l", "copy a link to this page's state"], ["t", "light or dark"],
  ["?", "this list"], ["Esc", "clear the selection, or close what is open"],
  ...PANELS.map((p): [string, string] => [p.key!, `${p.name}: ${p.says}`]),
];

/** Does a key pressed here belong to the element it was pressed in? */
export function taken(event: KeyboardEvent): boolean {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return true;
  return event.composedPath().some((e) => {
    const role = (e as HTMLElement).getAttribute?.("role");
    return /^(INPUT|TEXTAREA|SELECT)$/.test((e as HTMLElement).tagName ?? "") || role === "application" || (e as HTMLElement).isContentEditable === true;
  });
}
