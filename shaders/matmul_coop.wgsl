// matmul_coop: what `matmul` computes, for many rows of f16, on cooperative matrices of M x M, f16 with f32 sums.
//
//   workgroup: 64 rows x 64 columns of Y, 4 subgroups of 16 rows; Y = 0 in matrices
//     stage the first 32 of K: X, and W with its columns side by side, four by four in registers
//     for each 32 of K: stage the next 32 in the other half of workgroup memory; Y += X W; barrier
//   Y by way of workgroup memory, 32 columns at a time: bias, activation, residual
//
// Weights in blocks are expanded to f16 while they are staged, once for all 64 rows. Of the cycles that RADV estimates
// for navi31 64 multiply-adds take 0.9 here and 3.1 in `matmul`; one half of workgroup memory told from the other by
// an addition instead of a multiplication, 1.7 times as many, as no load of it was of 128 bits. PLAIN replaces the
// matrices by loops, see shared/matrices.wgsl.
{% if not PLAIN %}
enable wgpu_cooperative_matrix;
{% endif %}
{% include "shared/linear.wgsl" %}
{# 1, which no compiler knows: a processor's driver is not to unroll. #}
{% set ROLL = " * min(P.m, 1u)" if SOFTWARE else "" %}
{% set A = ["wg_x", "STRIDE"] %}
{% set B = {"w": ["wg_w", "STRIDE"]} %}
{% set C = ["wg_y", "BLOCK_K"] %}
{% include "shared/matrices.wgsl" %}

const BLOCK_K = 32u;
const STRIDE = 40u;
const HALF = 2560u;   // of what is staged: 64 rows or columns

var<workgroup> wg_x: array<f16, 5120>;   // 2 x 64 rows by K
var<workgroup> wg_w: array<f16, 5120>;   // 2 x 64 columns by K
var<workgroup> wg_y: array<f32, 2048>;   // 64 rows by 32 columns

{# Rows of W that one load of a word gives. #}
{% set PARTS = 2 if BLOCKS and PER_WORD == 8 else 1 %}

// Four elements of row `row` of X from column `k` on, zeros past its end.
fn staged_x(row: u32, k: u32) -> vec4<f16> {
{% if VEC == 4 %}
    return select(vec4<f16>(), vec4<f16>(load_x(row, min(k, P.k - 4u))), k < P.k);
{% else %}
    return vec4<f16>(load_x(row, k));
{% endif %}
}

{% macro stage(from, half) %}
{% for turn in range(turns_of(512) | int) %}
        {{ each_of(512, turn) }}
            let k = n % 8u * 4u;
            let value = staged_x(min(row_from + n / 8u, P.m - 1u), {{ from }} + k);
            let to = {{ half }} + n / 8u * STRIDE + k;
{% for e in range(4) %}
            wg_x[to + {{ e }}u] = value[{{ e }}];
{% endfor %}
        }
{% endfor %}
{% set ITEMS = 128 // PARTS %}
{% for turn in range(turns_of(ITEMS) | int) %}
        {{ each_of(ITEMS, turn) }}
            // Columns past the last repeat it.
            let quad = min(quad_from + n % 16u, P.w_stride / 4u - 1u);
            let k = n / 16u * {{ 4 * PARTS }}u;
{% if BLOCKS %}
            let scale = load_scales({{ from }} / 32u, quad);
            let words_0 = w[({{ from }} + k) / {{ PER_WORD }}u * (P.w_stride / 4u) + quad];
{% endif %}
{% for part in range(PARTS) %}
{% for e in range(4) %}
{% if BLOCKS %}
            let w_{{ part }}_{{ e }} = vec4<f16>(scale.d * {{ quants(part, e) }}{{ " + scale.m" if W_TYPE == "q4_1" else "" }});
{% else %}
            let w_{{ part }}_{{ e }} = select(vec4<f16>(), vec4<f16>(load_w(min({{ from }} + k + {{ e }}u, P.k - 1u), quad)), {{ from }} + k + {{ e }}u < P.k);
{% endif %}
{% endfor %}
{% endfor %}
            let to = {{ half }} + n % 16u * 4u * STRIDE + k;
{% for c in range(4) %}
{% for part in range(PARTS) %}
{% for e in range(4) %}
            wg_w[to + {{ c }}u * STRIDE + {{ 4 * part + e }}u] = w_{{ part }}_{{ e }}[{{ c }}];
{% endfor %}
{% endfor %}
{% endfor %}
        }
{% endfor %}
{% endmacro %}

@compute @workgroup_size({{ THREADS }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(subgroup_id) subgroup_id: u32,
    @builtin(subgroup_size) lanes: u32,
    @builtin(subgroup_invocation_id) lane_id: u32,
) {
{{ who() }}
    let quads = (P.n + 3u) / 4u;
    let column_blocks = (quads + 15u) / 16u;
    let index = group.y * groups.x + group.x;
    if (index >= column_blocks * ((P.m + 63u) / 64u)) { return; }
    let quad_from = index % column_blocks * 16u;
    let row_from = index / column_blocks * 64u;
    let tile_row = first_tile * 16u;
{% for i in range(16 // M) %}
{% for t in range(64 // M) %}
    var y_{{ i }}_{{ t }} = Sum();
{% endfor %}
{% endfor %}

    {
{{ stage("0u", "0u") }}
    }
    workgroupBarrier();
    var half = 0u;
    for (var k_from = 0u; k_from < P.k; k_from += BLOCK_K) {
        // A multiplication shows compilers how wide they may load.
        let other = 1u - half;
        let k_next = k_from + BLOCK_K;
        if (k_next < P.k) {
{{ stage("k_next", "other * HALF") }}
        }
{% for d in range(32 // M) %}
{% for i in range(16 // M) %}
        let x_{{ i }}_{{ d }} = {{ load_a("half * HALF + (tile_row + " ~ (i * M) ~ "u) * STRIDE + " ~ (d * M) ~ "u") }};
{% endfor %}
{% for t in range(64 // M) %}
        let w_{{ d }}_{{ t }} = {{ load_b("w", "half * HALF + " ~ (t * M) ~ "u * STRIDE + " ~ (d * M) ~ "u") }};
{% for i in range(16 // M) %}
        y_{{ i }}_{{ t }} = {{ multiply_add("w", "x_" ~ i ~ "_" ~ d, "w_" ~ d ~ "_" ~ t, "y_" ~ i ~ "_" ~ t) }};
{% endfor %}
{% endfor %}
{% endfor %}
        half = other;
        workgroupBarrier();
    }

{% for chunk in range(2) %}
    {{ owners() }}
{% for i in range(16 // M) %}
{% for t in range(32 // M) %}
        {{ store_c("y_" ~ i ~ "_" ~ (chunk * (32 // M) + t), "tile_row * BLOCK_K + " ~ (i * M * 32 + t * M) ~ "u") }}
{% endfor %}
{% endfor %}
    {{ end_owners() }}
    workgroupBarrier();
    for (var n = thread; n < 512u; n += {{ THREADS }}u) {
        let at = n / 8u * BLOCK_K + n % 8u * 4u;
        let row = row_from + n / 8u;
        let quad = quad_from + {{ chunk * 8 }}u + n % 8u;
        if (row < P.m && quad < quads) {
            store_y(row, quad, vec4<f32>(wg_y[at], wg_y[at + 1u], wg_y[at + 2u], wg_y[at + 3u]));
        }
    }
    workgroupBarrier();
{% endfor %}
}
