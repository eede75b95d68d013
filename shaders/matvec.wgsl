// matvec: Y = activate(X W + bias) + residual for a few rows, where reading W is all the cost.
//
//   workgroup: 16 threads along N x 4 slices of K; a thread: 4 columns of every row over its slice
//     for its k by 4: load 4 vec4 of W once for all ROWS rows
//   the slices are added up through workgroup memory, in their order
{% include "shared/linear.wgsl" %}

var<workgroup> wg_sum: array<vec4<f32>, {{ ROWS * 64 }}>;

@compute @workgroup_size(64)
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
    for (var k = (thread / 16u) * 4u; k < P.k; k += 16u) {
{% for e in range(4) %}
        let w_{{ e }} = load_w(k + {{ e }}u, column);
{% endfor %}
{% for r in range(ROWS) %}
        let x_{{ r }} = load_x(row_{{ r }}, k);
        sum_{{ r }} += x_{{ r }}.x * w_0 + x_{{ r }}.y * w_1 + x_{{ r }}.z * w_2 + x_{{ r }}.w * w_3;
{% endfor %}
    }
{% for r in range(ROWS) %}
    wg_sum[{{ r * 64 }}u + thread] = sum_{{ r }};
{% endfor %}
    workgroupBarrier();
    if (thread < 16u && quad < quads) {
{% for r in range(ROWS) %}
        if (from_row + {{ r }}u < P.m) {
            let at = {{ r * 64 }}u + thread;
            store_y(from_row + {{ r }}u, quad, wg_sum[at] + wg_sum[at + 16u] + wg_sum[at + 32u] + wg_sum[at + 48u]);
        }
{% endfor %}
    }
}
