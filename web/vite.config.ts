import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vite";

// Two ES modules, styles inside. views.js: a page, a notebook output and the workbench all load the same file.
// workbench.js (--mode workbench): the page of the workbench, which finds the views in globalThis.pellucid.
export default defineConfig(({ mode }) => {
  const name = mode === "workbench" ? "workbench" : "views";
  return {
    plugins: [svelte({ compilerOptions: { css: "injected", runes: true } })],
    build: {
      target: "es2022",
      outDir: "../src/pellucid/views/static",
      emptyOutDir: false,
      lib: { entry: name === "workbench" ? "src/workbench/main.ts" : "src/main.ts", formats: ["es"], fileName: () => `${name}.js` },
      modulePreload: false,
      minify: true,
      rolldownOptions: { output: { minify: true } },
      reportCompressedSize: false,
    },
    test: { include: ["tests/**/*.test.ts"], environment: "node" },
  } as any;
});
