//! What a step of decoding costs by how the cache lies and what it is stored in: one query over K keys.
//!
//! ```text
//! cargo bench --bench cache
//! ```
//!
//! Each form is held beside attention in f64 over the values as they are stored, then all are timed in turn on
//! the device's own clock; ratios are of medians, to contiguous f32. The error of quantised forms is that of the
//! result beside f16's, as root of mean squares over that of the result.

use qkv::attention::{Options, Tensors, View, record};
use qkv::gpu::{DType, Gpu, Recorder, Recording, Tensor};
use qkv::reference::{self, Attention};

/// Batch, query heads, KV heads, keys, head dim.
const SHAPES: [[u32; 5]; 3] = [
    [1, 8, 8, 4096, 64],
    [1, 32, 8, 4096, 128],
    [8, 32, 8, 1024, 128],
];
const FORMS: [(DType, Option<u32>); 9] = [
    (DType::F32, None),
    (DType::F32, Some(1)),
    (DType::F32, Some(16)),
    (DType::F32, Some(256)),
    (DType::F16, None),
    (DType::F16, Some(16)),
    (DType::Q8_0, None),
    (DType::Q8_0, Some(16)),
    (DType::Q4_0, None),
];
const ROUNDS: usize = 15;

/// Numbers about normal, the same in every run.
fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n)
        .map(|_| 2.0 * (uniform() + uniform() + uniform()))
        .collect()
}

/// Rows `[B, Hk, K, D]` as they lie in a shuffled pool `[B K / S, Hk, S, D]`.
fn paged(values: &[f32], [b, hk, k_len, d]: [usize; 4], page: usize, table: &[u32]) -> Vec<f32> {
    let mut pool = vec![0.0; values.len()];
    for (at, row) in values.chunks(d).enumerate() {
        let (j, h, n) = (at % k_len, at / k_len % hk, at / k_len / hk);
        debug_assert!(n < b);
        let place = table[n * (k_len / page) + j / page] as usize;
        let to = (place * hk + h) * page + j % page;
        pool[to * d..][..d].copy_from_slice(row);
    }
    pool
}

struct Form {
    recording: Recording,
    out: Tensor,
    bytes_per_token: f64,
}

fn prepare(
    gpu: &Gpu,
    [b, heads, kv_heads, k_len, d]: [u32; 5],
    (dtype, page): (DType, Option<u32>),
    [q, k, v]: [&[f32]; 3],
) -> qkv::Result<Form> {
    let extents = [b, kv_heads, k_len, d];
    let q = gpu.upload_floats("q", DType::F32, &[b, heads, 1, d], q)?;
    let out = gpu.empty("out", DType::F32, &[b, heads, 1, d])?;
    let pages = page.map(|page| {
        let n = b * k_len / page;
        // A step that has no factor with the number of pages visits all of them.
        let table: Vec<u32> = (0..n).map(|at| (at * 7919 + 13) % n).collect();
        (page, table)
    });
    let upload = |values: &[f32]| match &pages {
        None => gpu.upload_floats("kv", dtype, &extents, values),
        Some((page, table)) => {
            let sizes = extents.map(|n| n as usize);
            let pool = paged(values, sizes, *page as usize, table);
            let shape = [b * k_len / page, kv_heads, *page, d];
            gpu.upload_floats("kv", dtype, &shape, &pool)
        }
    };
    let (k, v) = (upload(k)?, upload(v)?);
    let table = pages
        .as_ref()
        .map(|(page, table)| gpu.upload_u32("pages", &[b, k_len / page], table))
        .transpose()?;
    let tensors = Tensors {
        pages: table.as_ref(),
        ..Tensors::new(
            View::bhld(&q)?,
            View::bhld(&k)?,
            View::bhld(&v)?,
            View::bhld(&out)?,
        )
    };
    let mut recorder = Recorder::new(gpu);
    record(&mut recorder, &tensors, &Options::default())?;
    Ok(Form {
        recording: recorder.finish()?,
        out,
        bytes_per_token: (k.bytes() + v.bytes()) as f64 / f64::from(b * k_len),
    })
}

/// Root of the mean square.
fn rms(values: impl Iterator<Item = f64>) -> f64 {
    let (n, sum) = values.fold((0, 0.0), |(n, sum), x| (n + 1, sum + x * x));
    (sum / f64::from(n.max(1))).sqrt()
}

/// What storage makes of rows of D columns.
fn stored(gpu: &Gpu, dtype: DType, d: u32, values: &[f32]) -> qkv::Result<Vec<f64>> {
    let shape = [values.len() as u32 / d, d];
    let tensor = gpu.upload_floats("stored", dtype, &shape, values)?;
    Ok(gpu
        .read_floats(&tensor)?
        .into_iter()
        .map(f64::from)
        .collect())
}

fn main() -> qkv::Result<()> {
    let gpu = Gpu::new()?.untuned();
    println!("{}", gpu.caps().name);
    for shape in SHAPES {
        let [b, heads, kv_heads, k_len, d] = shape;
        println!("\n{b},{heads},{kv_heads},1,{k_len},{d}  (B,H,Hk,Q,K,D)");
        println!(
            "form              bytes a token   median ms   to f32   error in f64   beside f16"
        );
        let n = (b * kv_heads * k_len * d) as usize;
        let q = noise(1, (b * heads * d) as usize);
        let (k, v) = (noise(2, n), noise(3, n));
        let own: Vec<f64> = q.iter().map(|&x| f64::from(x)).collect();
        let q_shape = [b, heads, 1, d].map(|n| n as usize);
        let v_shape = [b, kv_heads, k_len, d].map(|n| n as usize);
        let want = |dtype| -> qkv::Result<Vec<f64>> {
            let (k, v) = (stored(&gpu, dtype, d, &k)?, stored(&gpu, dtype, d, &v)?);
            Ok(reference::attention(&Attention::new(q_shape, v_shape, &own, &k, &v)).out)
        };
        let of_f16 = want(DType::F16)?;
        let mut forms = Vec::new();
        for form in FORMS {
            if form.0 == DType::F16 && !gpu.caps().f16 {
                continue;
            }
            let made = prepare(&gpu, shape, form, [&q, &k, &v])?;
            gpu.run(&made.recording)?;
            let got = gpu.read_floats(&made.out)?;
            let want = want(form.0)?;
            let off = |from: &[f64]| {
                let errors = got
                    .iter()
                    .zip(from)
                    .map(|(&got, want)| f64::from(got) - want);
                rms(errors) / rms(from.iter().copied())
            };
            let (error, beside) = (off(&want), off(&of_f16));
            assert!(error < 1e-5, "{form:?} is wrong by {error}");
            forms.push((form, made, error, beside, Vec::new()));
        }
        for _ in 0..ROUNDS {
            for (_, made, _, _, times) in &mut forms {
                times.push(gpu.time(&made.recording)?.as_secs_f64() * 1e3);
            }
        }
        let mut base = None;
        for ((dtype, page), made, error, beside, mut times) in forms {
            times.sort_by(f64::total_cmp);
            let median = times[times.len() / 2];
            let base = *base.get_or_insert(median);
            let name = match page {
                None => dtype.name().to_string(),
                Some(page) => format!("{} pages of {page}", dtype.name()),
            };
            println!(
                "{name:<18}{:>13.1}{median:>12.3}{:>9.2}{error:>15.1e}{:>12.2} %",
                made.bytes_per_token,
                median / base,
                100.0 * beside
            );
        }
    }
    Ok(())
}
