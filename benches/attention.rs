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
use qkv::gpu::{DType, Gpu, Recorder, Recording, Stream, Tensor};
use qkv::reference::{self, Attention, Offset};

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

fn main() -> qkv::Result<()> {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| word != "--bench")
        .collect();
    let gpu = Gpu::new()?.untuned();
    let stream = Stream::new(&gpu)?;
    let flush = stream.reading(&gpu)?;
    let limits = stream.limits(&gpu)?.f32;
    let (rate, bandwidth) = (limits.flops / 1e9, limits.read / 1e9);
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
                gpu.run(&flush)?;
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
