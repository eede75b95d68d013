// combine: two partial results over the same rows into one, by their LSE (natural logarithms):
// O = sum e^(lse_n - lse) O_n, lse = log(sum e^lse_n). A part with LSE -inf is empty.
//
//   one thread: four columns of one row
{% if F16 %}
enable f16;
{% endif %}
{% from "shared/rows.wgsl" import out_element, row_writer %}
struct Params {
    count: u32, value_dim: u32, heads: u32, rows: u32,                      // count: of threads with work
    o_at: vec4<u32>,                                                        // offset, strides of batch, head, row
    columns: vec4<u32>,                                                     // w: the stride of o's columns
    minus_infinity: f32, sequences_a: u32, sequences_b: u32, pad: u32,      // sequences: ragged rows' of each part
}
@group(0) @binding(0) var<uniform> P: Params;
@group(0) @binding(1) var<storage, read> a: array<f32>;                     // [B, H, Q, Dv]
@group(0) @binding(2) var<storage, read> lse_a: array<f32>;                 // [B, H, Q]
@group(0) @binding(3) var<storage, read> b: array<f32>;
@group(0) @binding(4) var<storage, read> lse_b: array<f32>;
@group(0) @binding(5) var<storage, read_write> o: array<{{ out_element(O_TYPE, VEC) }}>;
{% if HAS_LSE %}
@group(0) @binding(6) var<storage, read_write> lse: array<f32>;
{% endif %}
{% if RAGGED %}
@group(0) @binding({{ 7 if HAS_LSE else 6 }}) var<storage, read> cu_a: array<u32>; // [sequences + 1]
@group(0) @binding({{ 8 if HAS_LSE else 7 }}) var<storage, read> cu_b: array<u32>;
{% endif %}
{{ row_writer("o", O_TYPE, "value_dim", VEC) }}

const NEVER = -1.0e30;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let index = (group.y * groups.x + group.x) * 64u + thread;
    if (index >= P.count) { return; }
    let quads = (P.value_dim + 3u) / 4u;
    let row = index / quads;
    let d = index % quads * 4u;
    var x = select(lse_a[row], NEVER, lse_a[row] < NEVER);
    var y = select(lse_b[row], NEVER, lse_b[row] < NEVER);
{% if RAGGED %}
    // Nobody wrote the rows behind a part's last sequence; those behind both are left as they are.
    let in_a = row % P.rows < cu_a[P.sequences_a];
    let in_b = row % P.rows < cu_b[P.sequences_b];
    if (!in_a && !in_b) { return; }
    x = select(NEVER, x, in_a);
    y = select(NEVER, y, in_b);
{% endif %}
    let top = max(x, y);
    let p = select(exp(x - top), 0.0, x <= NEVER);
    let q = select(exp(y - top), 0.0, y <= NEVER);
    // 1 at least but where both are empty.
    let over = 1.0 / max(p + q, 1.0);
    var sum = vec4<f32>();
{% for e in range(4) %}
    if (d + {{ e }}u < P.value_dim) {
        let at = row * P.value_dim + d + {{ e }}u;
        if (!(p == 0.0)) { sum[{{ e }}] += p * over * a[at]; }
        if (!(q == 0.0)) { sum[{{ e }}] += q * over * b[at]; }
    }
{% endfor %}
    let place = vec3<u32>(row / (P.heads * P.rows), row / P.rows % P.heads, row % P.rows);
    let at = P.o_at.x + place.x * P.o_at.y + place.y * P.o_at.z + place.z * P.o_at.w;
    store_o(at, d, sum);
{% if HAS_LSE %}
    if (d == 0u) { lse[row] = select(top + log(p + q), P.minus_infinity, p + q == 0.0); }
{% endif %}
}
