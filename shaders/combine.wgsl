// combine: two partial results over the same rows into one, by their LSE (natural logarithms):
// O = sum e^(lse_n - lse) O_n, lse = log(sum e^lse_n). A part with LSE -inf is empty.
//
//   one thread: one element
struct Params { count: u32, value_dim: u32, minus_infinity: f32, unused: u32 }
@group(0) @binding(0) var<uniform> P: Params;
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> lse_a: array<f32>;
@group(0) @binding(3) var<storage, read> b: array<f32>;
@group(0) @binding(4) var<storage, read> lse_b: array<f32>;
@group(0) @binding(5) var<storage, read_write> o: array<f32>;
@group(0) @binding(6) var<storage, read_write> lse: array<f32>;

const NEVER = -1.0e30;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let index = (group.y * groups.x + group.x) * 64u + thread;
    if (index >= P.count) { return; }
    let row = index / P.value_dim;
    let x = select(lse_a[row], NEVER, lse_a[row] < NEVER);
    let y = select(lse_b[row], NEVER, lse_b[row] < NEVER);
    let top = max(x, y);
    let p = select(exp(x - top), 0.0, x <= NEVER);
    let q = select(exp(y - top), 0.0, y <= NEVER);
    let over = 1.0 / max(p + q, 0.5);
    var sum = 0.0;
    if (p > 0.0) { sum += p * over * a[index]; }
    if (q > 0.0) { sum += q * over * b[index]; }
    o[index] = sum;
    if (index % P.value_dim == 0u) { lse[row] = select(P.minus_infinity, top + log(max(p + q, 0.5)), p + q > 0.0); }
}
