// matmul: Y = activate(X W + bias) + residual for many rows.
//
//   workgroup: 16 threads along N x 4 along M; a thread: ROWS rows x 4 columns, all in registers
//     for k in 0 .. K by 4: load 4 vec4 of W (16 threads read 256 bytes in a row), ROWS vec4 of X
//                           (the same for 16 threads): 16 ROWS multiply-adds for 4 + ROWS loads
//     weights in blocks are expanded in registers, once for all ROWS rows
//
// No workgroup memory: W is read coalesced and X by broadcast, both from the first-level cache.
{% include "shared/linear.wgsl" %}

const ROWS = {{ ROWS }}u;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let quads = (P.n + 3u) / 4u;
    let quad_blocks = (quads + 15u) / 16u;
    let row_blocks = (P.m + 4u * ROWS - 1u) / (4u * ROWS);
    let index = group.y * groups.x + group.x;
    if (index >= quad_blocks * row_blocks) { return; }
    let quad = (index % quad_blocks) * 16u + thread % 16u;
    let row = (index / quad_blocks) * 4u * ROWS + (thread / 16u) * ROWS;
    if (quad >= quads || row >= P.m) { return; }
{% for r in range(ROWS) %}
    let row_{{ r }} = min(row + {{ r }}u, P.m - 1u);
    var sum_{{ r }} = vec4<f32>();
{% endfor %}
{% if BLOCKS %}
    for (var block = 0u; block < P.k / 32u; block += 1u) {
        let first = block * 32u;
        let scale = load_scales(block, quad);
        for (var k = first; k < {{ END }}; k += 8u) {
{% for part in range(2) %}
{% if part == 0 or PER_WORD == 4 %}
            let words_{{ part }} = w[(k / {{ PER_WORD }}u + {{ part }}u) * (P.w_stride / 4u) + quad];
{% endif %}
{% for e in range(4) %}
            let w_{{ part }}_{{ e }} = scale.d * {{ quants(part, e) }}{{ " + scale.m" if W_TYPE == "q4_1" else "" }};
{% endfor %}
{% for r in range(ROWS) %}
            let x_{{ part }}_{{ r }} = load_x(row_{{ r }}, k + {{ 4 * part }}u);
            sum_{{ r }} += x_{{ part }}_{{ r }}.x * w_{{ part }}_0 + x_{{ part }}_{{ r }}.y * w_{{ part }}_1
                + x_{{ part }}_{{ r }}.z * w_{{ part }}_2 + x_{{ part }}_{{ r }}.w * w_{{ part }}_3;
{% endfor %}
{% endfor %}
        }
    }
{% else %}
    for (var k = 0u; k < P.k; k += 4u) {
{% for e in range(4) %}
        let w_{{ e }} = load_w(k + {{ e }}u, quad);
{% endfor %}
{% for r in range(ROWS) %}
        let x_{{ r }} = load_x(row_{{ r }}, k);
        sum_{{ r }} += x_{{ r }}.x * w_0 + x_{{ r }}.y * w_1 + x_{{ r }}.z * w_2 + x_{{ r }}.w * w_3;
{% endfor %}
    }
{% endif %}
{% for r in range(ROWS) %}
    if (row + {{ r }}u < P.m) { store_y(row + {{ r }}u, quad, sum_{{ r }}); }
{% endfor %}
}
