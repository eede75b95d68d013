// What the two decode kernels share: tensors, and the block of rows and the part of the key axis that are a
// workgroup's own. The rows are the G = H / Hk query heads of one KV head times the queries, ROWS of them a
// workgroup, so that K and V are read once for all of them.
{% from "shared/rows.wgsl" import element, out_element, row_loader, row_writer %}
{% set lse = [["lse", "read_write", "f32"]] if HAS_LSE and not SPLIT else [] %}
{% set result = [["parts", "read_write", "f32"]] if SPLIT else [["o", "read_write", out_element(O_TYPE, VEC)]] %}
{% set buffers = [["q", "read", element(Q_TYPE, VEC)], ["k", "read", element(K_TYPE, VEC)], ["v", "read", element(V_TYPE, VEC)]] + result + lse %}
{% include "shared/problem.wgsl" %}
{% include "shared/score.wgsl" %}
{{ row_loader("q", Q_TYPE, "head_dim", "x", VEC, true) }}
{{ row_loader("k", K_TYPE, "head_dim", "y", VEC, true) }}
{{ row_loader("v", V_TYPE, "value_dim", "z", VEC, V_WHOLE) }}
{% if not SPLIT %}
{{ row_writer("o", O_TYPE, "value_dim", VEC) }}
{% endif %}

struct Work {
    b: u32, kb: u32, kh: u32,
    first: u32,               // of the rows
    rows: u32,                // that there are
    queries: u32,
    split: u32,
    length: u32,              // of the keys
    from_key: u32, to_key: u32,
    low: Keys,                // what the first query sees
    start: i32,               // where query 0 stands
}

// The work of workgroup `index`; no rows where it has none.
fn work_of(index: u32) -> Work {
    var work = Work();
    let per_kv = P.heads / P.kv_heads;
    let block = block_at(index / P.splits % P.blocks, {{ ROWS }}u, per_kv);
    if (block.x >= P.batch) { return work; }
    work.b = block.x;
    work.first = block.y;
    work.split = index % P.splits;
    work.kh = P.kv_from + index / (P.splits * P.blocks);
    work.kb = kv_row(work.b);
    work.queries = q_count(work.b);
    work.rows = work.queries * per_kv;
    work.length = kv_length(work.kb);
    work.start = q_position(work.b, work.length);
    // The keys that any of the rows sees, and of those this part's.
    let last = min(work.first + {{ ROWS }}u, work.rows) - 1u;
    let one_head = work.first / work.queries == last / work.queries;
    work.low = keys_of(work.b, work.start + i32(select(0u, work.first % work.queries, one_head)), work.length);
    let high = keys_of(work.b, work.start + i32(select(work.queries - 1u, last % work.queries, one_head)), work.length);
    let from_key = work.split * P.split_len;
    work.to_key = min(from_key + P.split_len, last_key(high));
    // In an invariant plan steps lie as they do from the part's beginning on, whatever the neighbours see.
    work.from_key = first_step(work.low, from_key, {{ "STEP" if INVARIANT else "64u" }});
    return work;
}

// Row `r` of the KV head's group: its head and its query. Rows past the last repeat it and are not written.
fn row_of(work: Work, r: u32) -> vec2<u32> {
    let row = min(work.first + r, work.rows - 1u);
    return vec2<u32>(work.kh * (P.heads / P.kv_heads) + row / work.queries, row % work.queries);
}

// What the sums of row `r` are multiplied by, one after the other, from its maximum and denominator, which one thread
// writes down. `merge` rounds the same way, so that a row whose keys are all in one part has the same bits by itself.
fn finish_row(work: Work, r: u32, m: f32, l: f32) -> vec2<f32> {
    let row = row_of(work, r);
    let is_row = work.first + r < work.rows;
{% if SPLIT %}
    if (is_row) {
        let at = part_at(work, row) + P.value_dim;
        parts[at] = m;
        parts[at + 1u] = l;
    }
    return vec2<f32>(1.0);
{% else %}
    let sink = sink_of(row.x);
    let top = max(m, sink);
    let shrink = exp2(m - top);
    let sum = fma(shrink, l, select(0.0, exp2(sink - top), sink > NEVER));
{% if HAS_LSE %}
    if (is_row) { lse[P.lse_from + row_number(work.b, row.x, row.y)] = lse_of(top, sum); }
{% endif %}
    return vec2<f32>(shrink, select(0.0, 1.0 / max(sum, 1.0e-37), sum > 0.0));
{% endif %}
}

{% if SPLIT %}
// This part of a row in scratch: O, m and l.
fn part_at(work: Work, row: vec2<u32>) -> u32 {
    return P.weights_from + (part_number(work.b, row.x, row.y) * P.splits + work.split) * (P.value_dim + 2u);
}
{% endif %}

{% if SPLIT %}
// Writes that row `r` sees no key of this part: `merge` reads no sums of it.
fn write_empty(work: Work, r: u32) {
    if (work.first + r >= work.rows) { return; }
    let at = part_at(work, row_of(work, r)) + P.value_dim;
    parts[at] = NEVER;
    parts[at + 1u] = 0.0;
}
{% endif %}

// Writes four columns of row `r`.
fn write_row(work: Work, r: u32, d: u32, x: vec4<f32>) {
    if (work.first + r >= work.rows) { return; }
    let row = row_of(work, r);
{% if SPLIT %}
    let at = part_at(work, row);
{% for e in range(4) %}
    if (d + {{ e }}u < P.value_dim) { parts[at + d + {{ e }}u] = x[{{ e }}]; }
{% endfor %}
{% else %}
    store_o(query_at(P.o_at, work.b, row.x, row.y), d, x);
{% endif %}
}

// Puts the queries of the block into workgroup memory.
fn stage_queries(work: Work, thread: u32) {
    for (var n = thread; n < {{ ROWS * QUADS }}u{{ ROLL }}; n += 64u) {
        let row = row_of(work, n / {{ QUADS }}u);
        wg_q[n] = load_q(query_at(P.q_at, work.b, row.x, row.y), n % {{ QUADS }}u * 4u);
    }
}
