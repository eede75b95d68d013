// matmul: Y = activate(X W + bias) + residual.
//
//   K is cut into SLICES; each is added up in its order, then the slices in theirs. So a row's bits are the
//   same however many rows there are, and whichever of the two ways:
//   few rows (SPLIT), where reading W is all the cost and K gives the threads:
//     workgroup: 16 threads along N x the slices; a thread: ROWS rows x 4 columns over its slice
//     the slices meet in workgroup memory
//   many rows:
//     workgroup: 16 threads along N x 4 along M; a thread: ROWS rows x 4 columns, slice after slice
//   workgroups next to each other take other rows of the same columns, so that W is read from memory once
//   a slice: for its k by 4: load 4 vec4 of W (16 threads read 256 bytes in a row) once for all ROWS rows,
//            ROWS vec4 of X (the same for 16 threads): 16 ROWS multiply-adds for 4 + ROWS loads
//     or, of weights in blocks, for its blocks: add up x q, then once d times the sum (+ m times that of x)
//
// Products are added as fma: where a compiler is free to fuse `a * b + c`, it could do so for one number of rows
// and not for another.
// No workgroup memory for tiles: W is read coalesced and X by broadcast, both from the first-level cache. On a
// processor, where each lane's read is one of its own, 8 lanes read 8 elements of X and pass them on (BY_LANES),
// and K is one slice, as rows and columns give threads enough and barriers are dear.
//
// Lost, on llvmpipe with 32 rows of [576, 1536] in q4_1, where this takes 2.7 ms of a core: X read by every lane,
// 6.2 ms; 16 rows a thread, 2.9 ms; a block's 32 rows unrolled, 4.1 ms.
{% if BROWSER and BY_LANES %}
enable subgroups;
{% endif %}
{% include "shared/linear.wgsl" %}

const ROWS = {{ ROWS }}u;
const SLICES = {{ SLICES }}u;
{% set PARTS = SLICES if SPLIT else 4 %}
{% set MEETING = SPLIT and SLICES > 1 %}
{% if MEETING %}

var<workgroup> wg_sum: array<vec4<f32>, {{ ROWS * 16 * SLICES }}>;
{% endif %}

// sum_r += the first `n` elements of x_r times as many rows of W.
{% macro add(sum, n, w) %}
{% for r in range(ROWS) %}
{% for e in range(n) %}
            {{ sum }}_{{ r }} = fma(vec4<f32>({{ "subgroupBroadcast(own_" ~ r ~ ", " ~ e ~ "u)" if BY_LANES else "x_" ~ e // 4 ~ "_" ~ r ~ "." ~ "xyzw"[e % 4] }}), {{ w }}_{{ e }}, {{ sum }}_{{ r }});
{% endfor %}
{% endfor %}
{% endmacro %}

// sum_r: the products of slice `slice`, from zero on.
{% macro add_slice() %}
{% for r in range(ROWS) %}
    var sum_{{ r }} = vec4<f32>();
{% endfor %}
{% if BLOCKS %}
    let blocks = P.k / 32u;
    let to = min((slice + 1u) * ((blocks + SLICES - 1u) / SLICES), blocks);
    for (var block = slice * ((blocks + SLICES - 1u) / SLICES); block < to; block += 1u) {
        let first = block * 32u;
{% for r in range(ROWS) %}
        var products_{{ r }} = vec4<f32>();
{% if W_TYPE == "q4_1" %}
        var x_sum_{{ r }} = 0.0;
{% endif %}
{% endfor %}
        for (var k = first; k < {{ END }}; k += 8u) {
{% if BY_LANES %}
{% for r in range(ROWS) %}
            let own_{{ r }} = f32(x[row_{{ r }} * P.k + k + lane]);
{% if W_TYPE == "q4_1" %}
            x_sum_{{ r }} += own_{{ r }};
{% endif %}
{% endfor %}
{% endif %}
{% for part in range(2) %}
{% if part == 0 or PER_WORD == 4 %}
            let words_{{ part }} = w[(k / {{ PER_WORD }}u + {{ part }}u) * (P.w_stride / 4u) + column];
{% endif %}
{% if not BY_LANES %}
{% for r in range(ROWS) %}
            let x_{{ part }}_{{ r }} = load_x(row_{{ r }}, k + {{ 4 * part }}u);
{% if W_TYPE == "q4_1" %}
            // One after the other: what waits to be added is held, and spills on Intel's compiler.
{% for c in ["x", "y", "z", "w"] %}
            x_sum_{{ r }} += x_{{ part }}_{{ r }}.{{ c }};
{% endfor %}
{% endif %}
{% endfor %}
{% endif %}
{% for e in range(4) %}
            let q_{{ 4 * part + e }} = {{ quants(part, e) }};
{% endfor %}
{% endfor %}
{{ add("products", 8, "q") }}
        }
        let scale = load_scales(block, column);
{% for r in range(ROWS) %}
        sum_{{ r }} = fma(scale.d, products_{{ r }}, sum_{{ r }});
{% if W_TYPE == "q4_1" %}
{% if BY_LANES %}
{% for step in [1, 2, 4] %}
        x_sum_{{ r }} += subgroupShuffleXor(x_sum_{{ r }}, {{ step }}u);
{% endfor %}
{% endif %}
        sum_{{ r }} = fma(scale.m, vec4<f32>(x_sum_{{ r }}), sum_{{ r }});
{% endif %}
{% endfor %}
    }
{% else %}
{% set BY = 8 if BY_LANES else 4 %}
    let steps = (P.k + {{ BY - 1 }}u) / {{ BY }}u;
    let to = min((slice + 1u) * ((steps + SLICES - 1u) / SLICES), steps) * {{ BY }}u;
    for (var k = slice * ((steps + SLICES - 1u) / SLICES) * {{ BY }}u; k < to; k += {{ BY }}u) {
{% if BY_LANES %}
{% for r in range(ROWS) %}
        let own_{{ r }} = load_x_element(row_{{ r }}, k + lane);
{% endfor %}
{% else %}
{% for r in range(ROWS) %}
        let x_0_{{ r }} = load_x(row_{{ r }}, k);
{% endfor %}
{% endif %}
{% for e in range(BY) %}
        let w_{{ e }} = load_w(k + {{ e }}u, column);
{% endfor %}
{{ add("sum", BY, "w") }}
    }
{% endif %}
{% endmacro %}

@compute @workgroup_size({{ 16 * PARTS }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
{% if BY_LANES %}
    @builtin(subgroup_invocation_id) subgroup_lane: u32,
{% endif %}
) {
    let quads = (P.n + 3u) / 4u;
    let quad_blocks = (quads + 15u) / 16u;
    let row_blocks = (P.m + {{ ROWS * (1 if SPLIT else 4) - 1 }}u) / {{ ROWS * (1 if SPLIT else 4) }}u;
    let index = group.y * groups.x + group.x;
    if (index >= quad_blocks * row_blocks) { return; }
    let quad = (index / row_blocks) * 16u + thread % 16u;
    let column = min(quad, quads - 1u);
    let from_row = {% if SPLIT %}(index % row_blocks) * ROWS{% else %}((index % row_blocks) * 4u + thread / 16u) * ROWS{% endif %};
{% if BY_LANES %}
    let lane = subgroup_lane % 8u;
{% endif %}
{% for r in range(ROWS) %}
    let row_{{ r }} = min(from_row + {{ r }}u, P.m - 1u);
{% endfor %}
{% if SPLIT %}
    let slice = {{ "thread / 16u" if MEETING else "0u" }};
{{ add_slice() }}
{% if MEETING %}
{% for r in range(ROWS) %}
    wg_sum[{{ r * 16 * SLICES }}u + thread] = sum_{{ r }};
{% endfor %}
    workgroupBarrier();
    if (thread >= 16u) { return; }
{% for r in range(ROWS) %}
    let total_{{ r }} = vec4<f32>(){% for slice in range(SLICES) %} + wg_sum[{{ (r * SLICES + slice) * 16 }}u + thread]{% endfor %};
{% endfor %}
{% endif %}
{% else %}
{% for r in range(ROWS) %}
    var total_{{ r }} = vec4<f32>();
{% endfor %}
    for (var slice = 0u; slice < SLICES; slice += 1u) {
{{ add_slice() }}
{% for r in range(ROWS) %}
        total_{{ r }} += sum_{{ r }};
{% endfor %}
    }
{% endif %}
    if (quad >= quads) { return; }
{% for r in range(ROWS) %}
    if (from_row + {{ r }}u < P.m) { store_y(from_row + {{ r }}u, quad, {{ "total" if MEETING or not SPLIT else "sum" }}_{{ r }}); }
{% endfor %}
}
