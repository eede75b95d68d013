// matvec: Y = activate(X W + bias) + residual for a few rows, where reading W is all the cost.
//
//   workgroup: 16 threads along N x SLICES of K; a thread: 4 columns of every row over its slice
//     for its k by 4: load 4 vec4 of W once for all ROWS rows
//     or, of weights in blocks, for its blocks: add up x q, then once d times the sum (+ m times that of x)
//   the slices are added up through workgroup memory, in their order
{% include "shared/linear.wgsl" %}

var<workgroup> wg_sum: array<vec4<f32>, {{ ROWS * 16 * SLICES }}>;

@compute @workgroup_size({{ 16 * SLICES }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let quads = (P.n + 3u) / 4u;
    let quad_blocks = (quads + 15u) / 16u;
    let row_blocks = (P.m + {{ ROWS - 1 }}u) / {{ ROWS }}u;
    let index = group.y * groups.x + group.x;
    if (index >= quad_blocks * row_blocks) { return; }
    let quad = (index % quad_blocks) * 16u + thread % 16u;
    let from_row = (index / quad_blocks) * {{ ROWS }}u;
    let column = min(quad, quads - 1u);
{% for r in range(ROWS) %}
    let row_{{ r }} = min(from_row + {{ r }}u, P.m - 1u);
    var sum_{{ r }} = vec4<f32>();
{% endfor %}
{% if BLOCKS %}
    for (var block = thread / 16u; block < P.k / 32u; block += {{ SLICES }}u) {
        let first = block * 32u;
{% for r in range(ROWS) %}
        var products_{{ r }} = vec4<f32>();
{% if W_TYPE == "q4_1" %}
        var x_sum_{{ r }} = vec4<f32>();
{% endif %}
{% endfor %}
        for (var k = first; k < {{ END }}; k += 8u) {
{% for part in range(2) %}
{% if part == 0 or PER_WORD == 4 %}
            let words_{{ part }} = w[(k / {{ PER_WORD }}u + {{ part }}u) * (P.w_stride / 4u) + column];
{% endif %}
{% for e in range(4) %}
            let q_{{ part }}_{{ e }} = {{ quants(part, e) }};
{% endfor %}
{% for r in range(ROWS) %}
            let x_{{ part }}_{{ r }} = load_x(row_{{ r }}, k + {{ 4 * part }}u);
            products_{{ r }} += x_{{ part }}_{{ r }}.x * q_{{ part }}_0 + x_{{ part }}_{{ r }}.y * q_{{ part }}_1
                + x_{{ part }}_{{ r }}.z * q_{{ part }}_2 + x_{{ part }}_{{ r }}.w * q_{{ part }}_3;
{% if W_TYPE == "q4_1" %}
            x_sum_{{ r }} += x_{{ part }}_{{ r }};
{% endif %}
{% endfor %}
{% endfor %}
        }
        let scale = load_scales(block, column);
{% for r in range(ROWS) %}
        sum_{{ r }} += scale.d * products_{{ r }}{% if W_TYPE == "q4_1" %} + scale.m * dot(x_sum_{{ r }}, vec4<f32>(1.0)){% endif %};
{% endfor %}
    }
{% else %}
    for (var k = (thread / 16u) * 4u; k < P.k; k += {{ 4 * SLICES }}u) {
{% for e in range(4) %}
        let w_{{ e }} = load_w(k + {{ e }}u, column);
{% endfor %}
{% for r in range(ROWS) %}
        let x_{{ r }} = load_x(row_{{ r }}, k);
        sum_{{ r }} += x_{{ r }}.x * w_0 + x_{{ r }}.y * w_1 + x_{{ r }}.z * w_2 + x_{{ r }}.w * w_3;
{% endfor %}
    }
{% endif %}
{% for r in range(ROWS) %}
    wg_sum[{{ r * 16 * SLICES }}u + thread] = sum_{{ r }};
{% endfor %}
    workgroupBarrier();
    if (thread < 16u && quad < quads) {
{% for r in range(ROWS) %}
        if (from_row + {{ r }}u < P.m) {
            let at = {{ r * 16 * SLICES }}u + thread;
            store_y(from_row + {{ r }}u, quad, wg_sum[at]{% for slice in range(1, SLICES) %} + wg_sum[at + {{ 16 * slice }}u]{% endfor %});
        }
{% endfor %}
    }
}
