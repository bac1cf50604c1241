import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { made, parts, said, withEdit } from "../src/workbench/edits";
import { Follow, Superseded } from "../src/workbench/follow";
import { checked, pack, unpack } from "../src/workbench/link";
import { KEYS, taken } from "../src/workbench/shortcuts";
import type { State } from "../src/workbench/types";

/** A server whose answers are given by hand, in any order. */
function server() {
  const asked: { question: string; signal: AbortSignal; give: (answer: string) => void; fail: (error: Error) => void }[] = [];
  const heard: string[] = [], failed: string[] = [], busy: boolean[] = [];
  const follow = new Follow<string, string>(
    (question, signal) => new Promise((give, fail) => { asked.push({ question, signal, give, fail }); signal.addEventListener("abort", () => fail(Object.assign(new Error("aborted"), { name: "AbortError" }))); }),
    { answered: (a) => heard.push(a), failed: (e) => failed.push(e.message), busy: (now) => busy.push(now) },
  );
  return { asked, heard, failed, busy, follow };
}
const settle = () => vi.advanceTimersByTimeAsync(0);

describe("following the typing", () => {
  beforeEach(() => { vi.useFakeTimers(); });
  afterEach(() => { vi.useRealTimers(); });

  test("a question is asked once the typing rests for 150 ms", async () => {
    const s = server();
    for (const text of ["T", "Th", "The"]) { s.follow.ask(text); await vi.advanceTimersByTimeAsync(100); }
    expect(s.asked).toHaveLength(0);
    await vi.advanceTimersByTimeAsync(50);
    expect(s.asked.map((a) => a.question)).toEqual(["The"]);
  });
  test("a newer question gives up the one that runs", async () => {
    const s = server();
    s.follow.ask("a", "now");
    s.follow.ask("b", "now");
    expect(s.asked.map((a) => a.signal.aborted)).toEqual([true, false]);
    s.asked[1].give("B");
    await settle();
    expect([s.heard, s.failed]).toEqual([["B"], []]);
  });
  test("an outdated answer never overwrites a newer one, even if the server sends it all the same", async () => {
    const given: Record<string, (answer: string) => void> = {}, heard: string[] = [];
    const follow = new Follow<string, string>((q) => new Promise((give) => { given[q] = give; }), { answered: (a) => heard.push(a), failed: () => {} });
    follow.ask("old", "now");
    follow.ask("new", "now");
    given.new("NEW");
    await settle();
    given.old("OLD");
    await settle();
    expect(heard).toEqual(["NEW"]);
  });
  test("a slider does not give up the running question; only its last position is asked after it", async () => {
    const s = server();
    for (const q of ["1", "2", "3"]) s.follow.ask(q, "sliding");
    expect(s.asked.map((a) => a.question)).toEqual(["1"]);
    s.asked[0].give("one");
    await settle();
    expect([s.heard, s.asked.map((a) => a.question)]).toEqual([["one"], ["1", "3"]]);
  });
  test("an idle question is asked only when nothing else is", async () => {
    const s = server();
    s.follow.ask("typed");
    s.follow.ask("rest", "idle");
    await vi.advanceTimersByTimeAsync(150);
    expect(s.asked.map((a) => a.question)).toEqual(["typed"]);
    s.follow.ask("rest", "idle");
    expect(s.asked).toHaveLength(1);
    s.asked[0].give("TYPED");
    await settle();
    s.follow.ask("rest", "idle");
    expect(s.asked.map((a) => a.question)).toEqual(["typed", "rest"]);
    expect(s.busy[s.busy.length - 1]).toBe(true);
  });
  test("an idle question is given up for a slider, which else would wait for it", async () => {
    const s = server();
    s.follow.ask("rest", "idle");
    s.follow.ask("2", "sliding");
    expect(s.asked.map((a) => [a.question, a.signal.aborted])).toEqual([["rest", true], ["2", false]]);
  });
  test("what failed is told, what was superseded is not", async () => {
    const s = server();
    s.follow.ask("a", "now");
    s.asked[0].fail(new Superseded());
    await settle();
    s.follow.ask("b", "now");
    s.asked[1].fail(new Error("no such site"));
    await settle();
    expect([s.failed, s.busy]).toEqual([["no such site"], [true, false, true, false]]);
  });
  test("what is stopped is not heard", async () => {
    const s = server();
    s.follow.ask("a", "now");
    s.follow.stop();
    s.asked[0].give("A");
    s.follow.ask("b");
    s.follow.stop();
    await vi.advanceTimersByTimeAsync(500);
    expect([s.heard, s.asked.length]).toEqual([[], 1]);
  });
});

const STATE: State = {
  version: 1,
  panes: [{ pane: "a", model: "SmolLM2", prompt: "<script>alert('é🙂')</script>", other: null, views: ["lens"], generate: 8, temperature: 0.7, seed: 3, answer: " Rome", word: "",
    edits: [{ component: "layers.5.attn.heads.3", kind: "steer", strength: -2.5, direction: "random", position: 4, seed: 3, on: false }] }],
  selection: { component: "layers.5.attn.heads.3", position: 4 },
  neurons: { sort: "activation", layer: 2 },
};

describe("links", () => {
  test("a state comes back from its link as it was", async () => {
    const link = await pack(STATE);
    expect(link).toMatch(/^#w=[A-Za-z0-9_-]+$/);
    expect(await unpack(link)).toEqual(STATE);
  });
  test("no link is no state, a broken one is an error", async () => {
    expect(await unpack("")).toBeNull();
    expect(await unpack("#other")).toBeNull();
    await expect(unpack("#w=AAAA")).rejects.toThrow();
    await expect(unpack(`#w=${"A".repeat(300_000)}`)).rejects.toThrow(/too long/);
  });
  test("a small link that unpacks into something huge is refused", async () => {
    const bomb = await pack({ ...STATE, panes: [{ ...STATE.panes[0], prompt: "a".repeat(20_000_000) }] });
    expect(bomb.length).toBeLessThan(200_000);
    await expect(unpack(bomb)).rejects.toThrow(/more than/);
  });
  test("only what has the right form is taken over", () => {
    const given = { version: 1, panes: [{ prompt: 3, edits: [{ component: "x", kind: "explode", strength: "2", position: -1 }, 7], generate: 1e9, views: [1] }, null], selection: "all", neurons: { sort: "none" } };
    expect(checked(given)).toEqual({
      version: 1, selection: { component: null, position: null }, neurons: { sort: "activation", layer: null },
      panes: [{ pane: "", model: "", prompt: "", other: null, generate: 64, temperature: 1, seed: null, answer: "", word: "", views: [""], edits: [{ component: "x", kind: "zero", strength: 1, direction: "contrast", position: null, seed: 0, on: true }] }],
    });
    for (const bad of [null, 3, {}, { version: 2 }]) expect(() => checked(bad)).toThrow(/version 1/);
  });
});

describe("edits", () => {
  test("the same act on the same part is changed, not added", () => {
    const one = withEdit([], made("layers.0.mlp.out", "zero", null, true));
    expect(withEdit(one, made("layers.0.mlp.out", "zero", null, true))).toHaveLength(1);
    expect(withEdit(one, made("layers.0.mlp.out", "zero", 3, true))).toHaveLength(2);
    expect(withEdit(one, made("layers.0.mlp.out", "scale", null, true))).toHaveLength(2);
  });
  test("steering without a second prompt goes along a random direction", () => {
    expect(made("embed", "steer", null, false).direction).toBe("random");
    expect(made("embed", "steer", null, true).direction).toBe("contrast");
  });
  test("an edit is said in words", () => {
    expect(said({ ...made("layers.5.attn.heads.3", "scale", 1, true), strength: 2 }, ["The", " cat"])).toBe("head 5.3 times 2 at 1 “␣cat”");
  });
  test("parts are offered as the model names them, heads left out where there are thousands", () => {
    const model = { id: "0", name: "m", kind: "decoder" as const, layers: 2, heads: 3, neurons: 4, parameters: 5, limit: null, generates: true, answers: { kind: "label" as const, names: ["O", "B-LOC"] }, chat: { refused: "", template: true, monitors: [], vectors: [] } };
    expect(parts(model)).toHaveLength(2 * (3 + 3));
    expect(parts({ ...model, layers: 80, heads: 64 })).toHaveLength(80 * 3);
    expect(parts({ ...model, kind: "encoder-decoder" })[0]).toBe("encoder.layers.0.resid_post");
    expect(parts(undefined)).toEqual([]);
  });
});

describe("shortcuts", () => {
  const event = (element: object, more = {}) => ({ ctrlKey: false, metaKey: false, altKey: false, defaultPrevented: false, composedPath: () => [element], ...more }) as unknown as KeyboardEvent;
  test("keys are text where one writes, and a grid keeps its own", () => {
    expect(taken(event({ tagName: "TEXTAREA" }))).toBe(true);
    expect(taken(event({ tagName: "DIV", getAttribute: () => "application" }))).toBe(true);
    expect(taken(event({ tagName: "BUTTON", getAttribute: () => null }))).toBe(false);
    expect(taken(event({ tagName: "BUTTON" }, { ctrlKey: true }))).toBe(true);
  });
  test("no key means two things", () => expect(new Set(KEYS.map(([k]) => k)).size).toBe(KEYS.length));
});
