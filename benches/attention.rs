//! Attention alone: verifies each shape against the oracle, then times it on the device's own clock.
//!
//! ```text
//! cargo bench --bench attention                    every shape, f32 and f16
//! cargo bench --bench attention -- prefill f32     those whose line has all of these words
//! ```
//!
//! The device's limits are measured first: multiply-adds from registers, and streaming reads. A shape's
//! share is of the one that bounds it: multiply-adds for prefill, reads of K and V for decode. Between two
//! runs a buffer larger than any cache is read. FLOP are 4 B H Q K D, halved where causal.

use std::hint::black_box;
use std::time::Instant;

use qkv::attention::{Options, Plan, Tensors, View, record};
use qkv::gpu::{DType, Gpu, Recorder, Recording, Tensor};
use qkv::reference::{self, Attention, Offset};
use qkv::wgpu;

struct Shape {
    batch: u32,
    heads: u32,
    kv_heads: u32,
    q_len: u32,
    k_len: u32,
    dim: u32,
    causal: bool,
}

const SHAPES: [[u32; 7]; 10] = [
    [1, 8, 8, 512, 512, 64, 0],
    [1, 8, 8, 1024, 1024, 64, 1],
    [1, 32, 8, 1024, 1024, 128, 1],
    [1, 8, 8, 4096, 4096, 64, 1],
    [2, 12, 12, 384, 384, 64, 0],
    [1, 8, 8, 16, 512, 64, 0],
    [1, 8, 8, 1, 512, 64, 0],
    [1, 32, 8, 1, 4096, 128, 0],
    [1, 32, 8, 1, 16384, 128, 0],
    [8, 32, 8, 1, 2048, 128, 0],
];

impl Shape {
    fn kind(&self) -> &'static str {
        match self.q_len {
            1 => "decode",
            16 => "cross",
            _ => "prefill",
        }
    }

    fn flop(&self) -> f64 {
        let all = [self.batch, self.heads, self.q_len, self.k_len, self.dim];
        let all: f64 = all.into_iter().map(f64::from).product();
        all * if self.causal { 2.0 } else { 4.0 }
    }

    fn kv_bytes(&self, dtype: DType) -> f64 {
        let all = [self.batch, self.kv_heads, self.k_len, self.dim];
        let all: f64 = all.into_iter().map(f64::from).product();
        2.0 * all * dtype.size() as f64
    }
}

/// Numbers about normal, the same in every run, as the storage type holds them.
fn noise(seed: u64, n: usize, dtype: DType) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n)
        .map(|_| 2.0 * (uniform() + uniform() + uniform()))
        .map(|x| match dtype {
            DType::F16 => half::f16::from_f32(x).to_f32(),
            _ => x,
        })
        .collect()
}

struct Prepared {
    plan: Plan,
    recording: Recording,
    out: Tensor,
    values: [Vec<f32>; 3],
    first_ms: f64,
}

fn prepare(gpu: &Gpu, shape: &Shape, dtype: DType) -> qkv::Result<Prepared> {
    let &Shape {
        batch,
        heads,
        kv_heads,
        q_len,
        k_len,
        dim,
        causal,
    } = shape;
    let shapes = [
        [batch, heads, q_len, dim],
        [batch, kv_heads, k_len, dim],
        [batch, kv_heads, k_len, dim],
    ];
    let values = [0, 1, 2].map(|ix| {
        let n = shapes[ix].iter().map(|&n| n as usize).product();
        noise(ix as u64 + 1, n, dtype)
    });
    let upload = |ix: usize| gpu.upload_floats("input", dtype, &shapes[ix], &values[ix]);
    let (q, k, v) = (upload(0)?, upload(1)?, upload(2)?);
    let out = gpu.empty("out", dtype, &shapes[0])?;
    let mut recorder = Recorder::new(gpu);
    let tensors = Tensors::new(
        View::bhld(&q)?,
        View::bhld(&k)?,
        View::bhld(&v)?,
        View::bhld(&out)?,
    );
    let options = Options {
        causal,
        ..Options::default()
    };
    let started = Instant::now();
    let plan = record(&mut recorder, &tensors, &options)?;
    let recording = recorder.finish()?;
    gpu.run(&recording)?;
    Ok(Prepared {
        plan,
        recording,
        out,
        values,
        first_ms: started.elapsed().as_secs_f64() * 1e3,
    })
}

/// The largest error over some rows of every head, as a share of the oracle's largest value there.
fn worst_error(gpu: &Gpu, shape: &Shape, prepared: &Prepared) -> qkv::Result<f64> {
    let got = gpu.read_floats(&prepared.out)?;
    let (q_len, k_len, d) = (
        shape.q_len as usize,
        shape.k_len as usize,
        shape.dim as usize,
    );
    let [q, k, v] = &prepared.values;
    let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    let group = (shape.heads / shape.kv_heads) as usize;
    let mut worst = 0f64;
    for head in 0..(shape.batch * shape.heads) as usize {
        let kv = head / group * k_len * d;
        let (k, v) = (wide(&k[kv..][..k_len * d]), wide(&v[kv..][..k_len * d]));
        for i in [0, q_len / 3, q_len - 1] {
            let at = (head * q_len + i) * d;
            let row = wide(&q[at..][..d]);
            let offset = [(k_len - q_len + i) as i64];
            let want = reference::attention(&Attention {
                causal: shape.causal,
                offset: Offset::PerRow(&offset),
                ..Attention::new([1, 1, 1, d], [1, 1, k_len, d], &row, &k, &v)
            });
            let top = want.out.iter().fold(0f64, |top, x| top.max(x.abs()));
            for (x, y) in got[at..][..d].iter().zip(&want.out) {
                worst = worst.max((f64::from(*x) - y).abs() / top);
            }
        }
    }
    Ok(worst)
}

/// A kernel of the bench's own, to measure the device with.
struct Probe {
    pipeline: wgpu::ComputePipeline,
    bind_group: wgpu::BindGroup,
    groups: u32,
}

impl Probe {
    fn new(gpu: &Gpu, text: &str, buffer: &Tensor, groups: u32) -> Self {
        let device = gpu.device();
        let descriptor = wgpu::ShaderModuleDescriptor {
            label: None,
            source: wgpu::ShaderSource::Wgsl(text.into()),
        };
        let checks = wgpu::ShaderRuntimeChecks::unchecked();
        // SAFETY: the probes below read and write within the 64 MiB of `big`: 16,384 threads, each of
        // which steps to 2^22 vec4s, or touches the cells of its own number and the next.
        let module = unsafe { device.create_shader_module_trusted(descriptor, checks) };
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: None,
            layout: None,
            module: &module,
            entry_point: Some("main"),
            compilation_options: Default::default(),
            cache: None,
        });
        let bind_group = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &pipeline.get_bind_group_layout(0),
            entries: &[wgpu::BindGroupEntry {
                binding: 0,
                resource: buffer.buffer().as_entire_binding(),
            }],
        });
        Probe {
            pipeline,
            bind_group,
            groups,
        }
    }

    /// Seconds, on the host's clock.
    fn run(&self, gpu: &Gpu) -> f64 {
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.bind_group, &[]);
        pass.dispatch_workgroups(self.groups, 1, 1);
        drop(pass);
        let started = Instant::now();
        gpu.queue().submit([encoder.finish()]);
        let waited = gpu.device().poll(wgpu::PollType::wait_indefinitely());
        waited.expect("the device answers");
        started.elapsed().as_secs_f64()
    }

    fn best(&self, gpu: &Gpu) -> f64 {
        self.run(gpu);
        (0..5).map(|_| self.run(gpu)).fold(f64::INFINITY, f64::min)
    }
}

/// 64 MiB of floats, read once by 16,384 threads, eight vec4s a turn.
fn reads() -> String {
    let turns = |line: &dyn Fn(usize) -> String| (0..8).map(line).collect::<String>();
    format!(
        "@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>;
@compute @workgroup_size(64) fn main(@builtin(global_invocation_id) id: vec3<u32>) {{
    {}
    for (var n = id.x; n < 4194304u; n += 131072u) {{ {} }}
    let sum = {}vec4<f32>();
    if (sum.x == 12345.0) {{ x[0] = sum; }}
}}",
        turns(&|n| format!("var s{n} = vec4<f32>();\n")),
        turns(&|n| format!("s{n} += x[n + {}u];\n", n * 16_384)),
        turns(&|n| format!("s{n} + ")),
    )
}

/// 16 independent chains of 4096 multiply-adds a thread.
fn multiply_adds() -> String {
    let chains = |line: &dyn Fn(usize) -> String| (0..16).map(line).collect::<String>();
    format!(
        "@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@compute @workgroup_size(64) fn main(@builtin(global_invocation_id) id: vec3<u32>) {{
    let a = x[id.x]; let b = x[id.x + 1u];
    {}
    for (var n = 0u; n < 4096u; n += 1u) {{ {} }}
    x[id.x] = {}0.0;
}}",
        chains(&|n| format!("var c{n} = a + {n}.0;\n")),
        chains(&|n| format!("c{n} = fma(c{n}, a, b);\n")),
        chains(&|n| format!("c{n} + ")),
    )
}

fn main() -> qkv::Result<()> {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| word != "--bench")
        .collect();
    let gpu = Gpu::new()?.untuned();
    let big = gpu.empty("big", DType::F32, &[16 << 20])?;
    let flush = Probe::new(&gpu, &reads(), &big, 256);
    let bandwidth = (64 << 20) as f64 / flush.best(&gpu) / 1e9;
    let rate = Probe::new(&gpu, &multiply_adds(), &big, 256);
    let rate = 2.0 * 16.0 * 4096.0 * 256.0 * 64.0 / rate.best(&gpu) / 1e9;
    println!("{}", gpu.caps().name);
    println!("limits: {rate:.1} GFLOP/s of f32 multiply-adds, {bandwidth:.2} GB/s of reads\n");
    println!(
        "shape (B,H,Hk,Q,K,D)            type route      first ms   median ms   least ms      rate   share   error"
    );
    for numbers in SHAPES {
        let [batch, heads, kv_heads, q_len, k_len, dim, causal] = numbers;
        let shape = Shape {
            batch,
            heads,
            kv_heads,
            q_len,
            k_len,
            dim,
            causal: causal == 1,
        };
        for dtype in [DType::F32, DType::F16] {
            let name = format!(
                "{} {batch},{heads},{kv_heads},{q_len},{k_len},{dim}{}",
                shape.kind(),
                if shape.causal { " causal" } else { "" }
            );
            let line = format!("{name} {}", dtype.name());
            if !words.iter().all(|word| line.contains(word.as_str())) {
                continue;
            }
            if dtype == DType::F16 && !gpu.caps().f16 {
                println!("{name:31} f16  this device has no f16 in shaders");
                continue;
            }
            let prepared = prepare(&gpu, &shape, dtype)?;
            let error = worst_error(&gpu, &shape, &prepared)?;
            let allowed = if dtype == DType::F32 { 1e-4 } else { 2e-3 };
            assert!(error < allowed, "{line}: an error of {error:.1e}");
            let mut times = Vec::new();
            let started = Instant::now();
            while times.len() < 5 || (started.elapsed().as_secs_f64() < 2.0 && times.len() < 50) {
                flush.run(&gpu);
                times.push(black_box(gpu.time(&prepared.recording)?).as_secs_f64());
            }
            times.sort_by(f64::total_cmp);
            let (median, least) = (times[times.len() / 2], times[0]);
            let (figure, share) = match shape.kind() {
                "decode" => {
                    let speed = shape.kv_bytes(dtype) / median / 1e9;
                    (format!("{speed:.2} GB/s"), speed / bandwidth)
                }
                _ => {
                    let speed = shape.flop() / median / 1e9;
                    (format!("{speed:.1} GF/s"), speed / rate)
                }
            };
            println!(
                "{name:31} {:4} {:10} {:8.0} {:11.3} {:10.3} {figure:>12} {:5.0} % {error:8.1e}",
                dtype.name(),
                format!("{:?}", prepared.plan.route),
                prepared.first_ms,
                median * 1e3,
                least * 1e3,
                share * 100.0,
            );
        }
    }
    Ok(())
}
