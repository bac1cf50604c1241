// Taking a view along: as a picture, a drawing, numbers.
import { xml } from "./brush";
import { list } from "./numbers";
import type { Table } from "../schema";

export function save(name: string, content: string | Blob, type: string): void {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  const link = Object.assign(document.createElement("a"), { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** RFC 4180; text that a spreadsheet would run as a formula is kept from it by an apostrophe. */
export function csv(table: Table): string {
  const columns = table.columns.map((c) => (c.numbers ? list(c.numbers).map((x) => (Number.isNaN(x) ? "" : String(x))) : (c.texts ?? []).map((t) => (/^[=+\-@\t\r]/.test(t) ? `'${t}` : t))));
  const quoted = (text: string) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const rows = [table.columns.map((c) => c.name)];
  for (let i = 0; i < (columns[0]?.length ?? 0); i++) rows.push(columns.map((c) => c[i] ?? ""));
  return rows.map((row) => row.map(quoted).join(",")).join("\r\n") + "\r\n";
}

/** An SVG file of a figure: of its one drawing, or of everything as it stands on the page. */
export function toSvg(figure: HTMLElement, paper: string): string {
  const drawings = figure.querySelectorAll<SVGSVGElement>("svg.drawing");
  if (drawings.length === 1 && !figure.querySelector("canvas, table")) return drawn(drawings[0], paper);
  const { width, height } = figure.getBoundingClientRect();
  const copy = styled(figure) as HTMLElement;
  copy.setAttribute("xmlns", "http://www.w3.org/1999/xhtml");
  const [w, h] = [Math.ceil(width), Math.ceil(height)];
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${w}" height="${h}" viewBox="0 0 ${w} ${h}"><rect width="100%" height="100%" fill="${xml(paper)}"/><foreignObject width="100%" height="100%">${new XMLSerializer().serializeToString(copy)}</foreignObject></svg>`;
}

function drawn(svg: SVGSVGElement, paper: string): string {
  const { width, height } = svg.getBoundingClientRect();
  const copy = styled(svg) as SVGSVGElement;
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("width", String(Math.ceil(width)));
  copy.setAttribute("height", String(Math.ceil(height)));
  const sheet = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  for (const [k, v] of Object.entries({ width: "100%", height: "100%", fill: paper })) sheet.setAttribute(k, v);
  copy.prepend(sheet);
  return new XMLSerializer().serializeToString(copy);
}

const KEPT = ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-family", "font-size", "font-weight", "text-anchor", "dominant-baseline", "color"];
const LAID = [...KEPT, "display", "position", "left", "top", "right", "bottom", "width", "height", "margin", "padding", "background-color", "border", "border-radius",
  "box-shadow", "line-height", "text-align", "white-space", "flex-wrap", "flex-direction", "gap", "align-items", "justify-content", "grid-template-columns", "box-sizing", "overflow", "visibility", "clip-path", "vertical-align", "border-collapse", "transform"];

/** A copy that carries its computed styles, with canvases as images. */
function styled(node: Element): Element {
  if (node instanceof HTMLCanvasElement) {
    const image = document.createElement("img");
    image.src = node.toDataURL();
    image.setAttribute("style", `width:${node.clientWidth}px;height:${node.clientHeight}px;display:block`);
    return image;
  }
  const copy = node.cloneNode(false) as Element;
  const style = getComputedStyle(node);
  const names = node instanceof SVGElement && !(node instanceof SVGSVGElement) ? KEPT : LAID;
  copy.setAttribute("style", names.map((name) => `${name}:${style.getPropertyValue(name)}`).join(";"));
  for (const name of ["class", "onclick", "tabindex"]) copy.removeAttribute(name);
  for (const child of node.childNodes) {
    if (child.nodeType === 3) copy.append(child.cloneNode());
    else if (child instanceof Element && style.display !== "none") copy.append(styled(child));
  }
  return copy;
}

export async function toPng(svg: string, scale = 2): Promise<Blob> {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = Math.min(16_000, scale * image.width);
  canvas.height = Math.min(16_000, scale * image.height);
  canvas.getContext("2d")!.drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve, reject) => canvas.toBlob((b) => (b ? resolve(b) : reject(new Error("the picture is too large"))), "image/png"));
}
