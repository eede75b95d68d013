// norm: Y[r] = (X[r] - mean) / sqrt(variance + eps) * gamma + beta, one workgroup a row.
//
//   the variance is taken about the mean in a second pass: no cancellation
{% if F16 %}
enable f16;
{% endif %}
struct Params { rows: u32, width: u32, eps: f32, pad: u32 }
@group(0) @binding(0) var<uniform> P: Params;
@group(0) @binding(1) var<storage, read> x: array<{{ T }}>;                 // [R, d]
@group(0) @binding(2) var<storage, read> gamma: array<f32>;                 // [d]
@group(0) @binding(3) var<storage, read> beta: array<f32>;                  // [d]
@group(0) @binding(4) var<storage, read_write> y: array<{{ T }}>;           // [R, d]

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

    var sum = 0.0;
    for (var c = thread; c < P.width; c += THREADS) { sum += f32(x[at + c]); }
    partial[thread] = sum;
    workgroupBarrier();
    sum = 0.0;
    for (var n = 0u; n < THREADS; n += 1u) { sum += partial[n]; }
    let mean = sum / f32(P.width);
    workgroupBarrier();

    var square = 0.0;
    for (var c = thread; c < P.width; c += THREADS) {
        let off = f32(x[at + c]) - mean;
        square += off * off;
    }
    partial[thread] = square;
    workgroupBarrier();
    square = 0.0;
    for (var n = 0u; n < THREADS; n += 1u) { square += partial[n]; }
    let over = inverseSqrt(square / f32(P.width) + P.eps);

    for (var c = thread; c < P.width; c += THREADS) {
        y[at + c] = {{ T }}((f32(x[at + c]) - mean) * over * gamma[c] + beta[c]);
    }
}
