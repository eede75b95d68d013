// norm: Y[r] = (X[r] - mean) / sqrt(variance + eps) * gamma + beta, one workgroup a row; RMSNorm
// (Zhang and Sennrich 2019) is the same about zero, without beta.
//
//   the variance is taken about the mean in a second pass: no cancellation
//   with `rows`, row r is that of X which rows[r] names
{% if F16 %}
enable f16;
{% endif %}
struct Params { rows: u32, width: u32, eps: f32, x_rows: u32 }
@group(0) @binding(0) var<uniform> P: Params;
@group(0) @binding(1) var<storage, read> x: array<{{ T }}>;                 // [R, d]
@group(0) @binding(2) var<storage, read> gamma: array<f32>;                 // [d]
@group(0) @binding(3) var<storage, read_write> y: array<{{ T }}>;           // [R, d]
{% set optional = ([] if RMS else ["beta: array<f32>"]) + (["rows: array<u32>"] if HAS_ROWS else []) %}
{% for declaration in optional %}
@group(0) @binding({{ 3 + loop.index }}) var<storage, read> {{ declaration }};
{% endfor %}

const THREADS = 64u;
var<workgroup> partial: array<f32, 64>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let row = group.y * groups.x + group.x;
    if (row >= P.rows) { return; }
    let at = row * P.width;
{% if HAS_ROWS %}
    let from_at = min(rows[row], P.x_rows - 1u) * P.width;
{% else %}
    let from_at = at;
{% endif %}

{% if RMS %}
    let mean = 0.0;
{% else %}
    var sum = 0.0;
    for (var c = thread; c < P.width; c += THREADS) { sum += f32(x[from_at + c]); }
    partial[thread] = sum;
    workgroupBarrier();
    sum = 0.0;
    for (var n = 0u; n < THREADS; n += 1u) { sum += partial[n]; }
    let mean = sum / f32(P.width);
    workgroupBarrier();
{% endif %}

    var square = 0.0;
    for (var c = thread; c < P.width; c += THREADS) {
        let off = f32(x[from_at + c]) - mean;
        square += off * off;
    }
    partial[thread] = square;
    workgroupBarrier();
    square = 0.0;
    for (var n = 0u; n < THREADS; n += 1u) { square += partial[n]; }
    let over = inverseSqrt(square / f32(P.width) + P.eps);

    for (var c = thread; c < P.width; c += THREADS) {
        y[at + c] = {{ T }}((f32(x[from_at + c]) - mean) * over * gamma[c]{{ "" if RMS else " + beta[c]" }});
    }
}
