import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vite";

// One ES module, styles inside: a page, a notebook output and the workbench all load the same file.
export default defineConfig({
  plugins: [svelte({ compilerOptions: { css: "injected", runes: true } })],
  build: {
    target: "es2022",
    outDir: "../src/pellucid/views/static",
    emptyOutDir: false,
    lib: { entry: "src/main.ts", formats: ["es"], fileName: () => "views.js" },
    modulePreload: false,
    minify: true,
    rolldownOptions: { output: { minify: true } },
    reportCompressedSize: false,
  },
  test: { include: ["tests/**/*.test.ts"], environment: "node" },
} as any);
