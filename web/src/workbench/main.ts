// The page of `pellucid workbench`. views.js, loaded before, draws the views; this draws everything around them.
import { mount } from "svelte";
import base from "../base.css?inline";
import { Api } from "./api";
import App from "./App.svelte";
import { Bench } from "./bench.svelte";
import own from "./workbench.css?inline";
import { views } from "./views";

/** The token came with this script; it is taken out of the address bar, so that it is not copied along with a link. */
function token(): string {
  const address = new URL(location.href);
  address.searchParams.delete("token");
  history.replaceState(null, "", address.pathname + address.search + address.hash);
  return new URL(import.meta.url).searchParams.get("token") ?? "";
}

/** The styles of the views, for a page instead of a shadow root. */
function dress(): void {
  document.head.querySelectorAll("style").forEach((early) => early.remove()); // what the bare page wore until now
  const style = document.createElement("style");
  style.textContent = base.replaceAll(/:host\((\[[^)]*\])\)/g, ":root$1").replaceAll(":host", ":root") + own;
  document.head.append(style);
  const { page } = views();
  const follow = () => { if (document.documentElement.dataset.theme !== page.theme) document.documentElement.dataset.theme = page.theme; };
  follow();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => { document.documentElement.dataset.theme = event.matches ? "dark" : "light"; });
}

dress();
const bench = new Bench(new Api(token()));
addEventListener("pagehide", () => void bench.keep());
addEventListener("hashchange", () => void bench.follow());
mount(App, { target: document.getElementById("workbench")!, props: { bench } });
void bench.start();
