//! What a step of decoding costs by how the cache lies and what it is stored in: one query over K keys; by whether
//! sequences read the keys that they share once; and by whether sequences of different lengths go together.
//!
//! ```text
//! cargo bench --bench cache            # everything
//! cargo bench --bench cache -- pages   # the forms of the cache alone, measured for longer
//! cargo bench --bench cache -- ragged  # sequences of different lengths alone
//! ```
//!
//! Each form is held beside attention in f64 over the values as they are stored, then all are timed in turn on
//! the device's own clock; ratios are of medians, to contiguous f32, and the ratio of the shortest times to the same type's in
//! one block. The error of quantised forms is that of the
//! result beside f16's, as root of mean squares over that of the result.

use qkv::attention::{Options, SharedKeys, Tensors, View, record, record_cascade};
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
const LONG_ROUNDS: usize = 101;

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
    let asked = |part| std::env::args().any(|argument| argument == part);
    if asked("ragged") {
        return ragged(&gpu);
    }
    let pages_alone = asked("pages");
    let rounds = if pages_alone { LONG_ROUNDS } else { ROUNDS };
    for shape in SHAPES {
        let [b, heads, kv_heads, k_len, d] = shape;
        println!("\n{b},{heads},{kv_heads},1,{k_len},{d}  (B,H,Hk,Q,K,D)");
        println!(
            "form              bytes a token   median ms   to f32   to one block   error in f64   beside f16"
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
        for _ in 0..rounds {
            for (_, made, _, _, times) in &mut forms {
                times.push(gpu.time(&made.recording)?.as_secs_f64() * 1e3);
            }
        }
        let mut base = None;
        let mut one_block = f64::NAN;
        for ((dtype, page), made, error, beside, times) in forms {
            let least = times.iter().copied().fold(f64::INFINITY, f64::min);
            if page.is_none() {
                one_block = least;
            }
            let to_block = least / one_block;
            let median = median(times);
            let base = *base.get_or_insert(median);
            let name = match page {
                None => dtype.name().to_string(),
                Some(page) => format!("{} pages of {page}", dtype.name()),
            };
            println!(
                "{name:<18}{:>13.1}{median:>12.3}{:>9.2}{to_block:>15.2}{error:>15.1e}{:>12.2} %",
                made.bytes_per_token,
                median / base,
                100.0 * beside
            );
        }
    }
    if pages_alone {
        return Ok(());
    }
    shared_keys(&gpu)?;
    ragged(&gpu)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// How far `b` is off from `a`, of its size.
fn rms_off(a: &[f32], b: &[f32]) -> f64 {
    let off = rms(a.iter().zip(b).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    off / rms(a.iter().map(|&x| f64::from(x)))
}

/// Medians of some recordings' times in milliseconds, taken in turn.
fn medians(gpu: &Gpu, recordings: &[Recording]) -> qkv::Result<Vec<f64>> {
    let mut times = vec![Vec::new(); recordings.len()];
    for _ in 0..ROUNDS {
        for (recording, times) in recordings.iter().zip(&mut times) {
            times.push(gpu.time(recording)?.as_secs_f64() * 1e3);
        }
    }
    Ok(times.into_iter().map(median).collect())
}

/// Positions of a page.
const PAGE: u32 = 16;

/// One new token of each of 16 sequences, whose first 2,048 keys are the same pages.
fn shared_keys(gpu: &Gpu) -> qkv::Result<()> {
    const SEQUENCES: u32 = 16;
    const SHARED: u32 = 2048;
    println!("\n{SEQUENCES} sequences that share {SHARED} keys, one token each, pages of {PAGE}");
    println!("H,Hk,D,own keys    each its own ms   shared once ms   times faster");
    for [heads, kv_heads, d, own] in [[9, 3, 64, 64], [32, 8, 128, 64], [32, 8, 128, 512]] {
        let (first, behind) = (SHARED / PAGE, own / PAGE);
        let pool = [first + SEQUENCES * behind, kv_heads, PAGE, d];
        let upload = |seed, name: &str, shape: [u32; 4]| {
            let values = noise(seed, shape.iter().product::<u32>() as usize);
            gpu.upload_floats(name, DType::F32, &shape, &values)
        };
        let rows = [1, heads, SEQUENCES, d];
        let q = upload(5, "q", rows)?;
        let (k, v) = (upload(6, "k", pool)?, upload(7, "v", pool)?);
        let own_pages = |s: u32| (0..behind).map(move |ix| first + s * behind + ix);
        let table =
            |rows: Vec<u32>, n: u32| gpu.upload_u32("pages", &[n, rows.len() as u32 / n], &rows);
        let all = table(
            (0..SEQUENCES)
                .flat_map(|s| (0..first).chain(own_pages(s)))
                .collect(),
            SEQUENCES,
        )?;
        let behind = table((0..SEQUENCES).flat_map(own_pages).collect(), SEQUENCES)?;
        let once = table((0..first).collect(), 1)?;
        let each: Vec<u32> = (0..=SEQUENCES).collect();
        let cu_q = gpu.upload_u32("cu_q", &[SEQUENCES + 1], &each)?;
        let group = gpu.upload_u32("group", &[2], &[0, SEQUENCES])?;
        let shared_len = gpu.upload_u32("shared keys", &[1], &[SHARED])?;
        let outs = [
            gpu.empty("out", DType::F32, &rows)?,
            gpu.empty("out", DType::F32, &rows)?,
        ];
        let tensors = |pages, out| -> qkv::Result<Tensors> {
            Ok(Tensors {
                pages: Some(pages),
                cu_q: Some(&cu_q),
                ..Tensors::new(
                    View::bhld(&q)?,
                    View::bhld(&k)?,
                    View::bhld(&v)?,
                    View::bhld(out)?,
                )
            })
        };
        let causal = Options {
            causal: true,
            ..Options::default()
        };
        let mut apart = Recorder::new(gpu);
        record(&mut apart, &tensors(&all, &outs[0])?, &causal)?;
        let mut together = Recorder::new(gpu);
        let shared = SharedKeys {
            pages: &once,
            kv_len: &shared_len,
            cu_q: &group,
        };
        record_cascade(
            &mut together,
            &tensors(&behind, &outs[1])?,
            &shared,
            &causal,
        )?;
        let recordings = [apart.finish()?, together.finish()?];
        for recording in &recordings {
            gpu.run(recording)?;
        }
        let [a, b] = outs.each_ref().map(|out| gpu.read_floats(out));
        let (a, b) = (a?, b?);
        let error = rms_off(&a, &b);
        assert!(error < 1e-5, "they differ by {error}");
        let times = medians(gpu, &recordings)?;
        println!(
            "{:<18}{:>16.3}{:>17.3}{:>15.2}",
            format!("{heads},{kv_heads},{d},{own}"),
            times[0],
            times[1],
            times[0] / times[1]
        );
    }
    Ok(())
}

/// Sequences of different lengths in one launch, beside the sum of launches of their own.
fn ragged(gpu: &Gpu) -> qkv::Result<()> {
    // New tokens and keys of each: two prompts' chunks, and texts that go on.
    const PARTS: [[u32; 2]; 8] = [
        [192, 192],
        [64, 1024],
        [1, 4096],
        [1, 2048],
        [1, 512],
        [1, 512],
        [1, 64],
        [1, 16],
    ];
    println!("\n8 ragged sequences in pages of {PAGE}: (new tokens, keys) {PARTS:?}");
    println!("H,Hk,D,invariant   together ms   sum of parts ms   ratio");
    for ([heads, kv_heads, d], batch_invariant) in [[9, 3, 64], [32, 8, 128]]
        .into_iter()
        .flat_map(|shape| [(shape, false), (shape, true)])
    {
        let total: u32 = PARTS.iter().map(|[_, k]| k / PAGE).sum();
        let pool = [total, kv_heads, PAGE, d];
        let upload = |seed, name: &str, shape: [u32; 4]| {
            let values = noise(seed, shape.iter().product::<u32>() as usize);
            gpu.upload_floats(name, DType::F32, &shape, &values)
        };
        let (k, v) = (upload(8, "k", pool)?, upload(9, "v", pool)?);
        let causal = Options {
            causal: true,
            batch_invariant,
            ..Options::default()
        };
        let mut at = 0;
        let rows: Vec<Vec<u32>> = PARTS
            .iter()
            .map(|[_, k]| {
                let row = at..at + k / PAGE;
                at = row.end;
                row.collect()
            })
            .collect();
        let new: u32 = PARTS.iter().map(|[q, _]| q).sum();
        let q = upload(10, "q", [1, new, heads, d])?;
        let together = gpu.empty("out", DType::F32, &[1, new, heads, d])?;
        let apart = gpu.empty("out", DType::F32, &[1, new, heads, d])?;
        let ends: Vec<u32> = std::iter::once(0)
            .chain(PARTS.iter().scan(0, |end, [q, _]| {
                *end += q;
                Some(*end)
            }))
            .collect();
        let record_parts =
            |parts: std::ops::Range<usize>, out: &Tensor| -> qkv::Result<Recording> {
                let from = ends[parts.start];
                let cu_q: Vec<u32> = ends[parts.start..=parts.end]
                    .iter()
                    .map(|end| end - from)
                    .collect();
                let extents = [1, heads, ends[parts.end] - from, d];
                let width = rows[parts.clone()].iter().map(Vec::len).max().unwrap_or(0);
                let mut pages = Vec::new();
                for row in &rows[parts.clone()] {
                    pages.extend_from_slice(row);
                    pages.resize(pages.len() + width - row.len(), 0);
                }
                let n = parts.len() as u32;
                let lengths: Vec<u32> = PARTS[parts].iter().map(|&[_, k]| k).collect();
                let pages = gpu.upload_u32("pages", &[n, width as u32], &pages)?;
                let lengths = gpu.upload_u32("lengths", &[n], &lengths)?;
                let cu_q = gpu.upload_u32("cu_q", &[n + 1], &cu_q)?;
                let view = |tensor| View::new(tensor, extents, from * heads * d, [0, d, heads * d]);
                let tensors = Tensors {
                    pages: Some(&pages),
                    kv_len: Some(&lengths),
                    cu_q: Some(&cu_q),
                    ..Tensors::new(view(&q)?, View::bhld(&k)?, View::bhld(&v)?, view(out)?)
                };
                let mut recorder = Recorder::new(gpu);
                record(&mut recorder, &tensors, &causal)?;
                recorder.finish()
            };
        let mut recordings = vec![record_parts(0..PARTS.len(), &together)?];
        for at in 0..PARTS.len() {
            recordings.push(record_parts(at..at + 1, &apart)?);
        }
        for recording in &recordings {
            gpu.run(recording)?;
        }
        let (a, b) = (gpu.read_floats(&together)?, gpu.read_floats(&apart)?);
        let error = rms_off(&a, &b);
        assert!(error < 1e-5, "they differ by {error}");
        let times = medians(gpu, &recordings)?;
        let parts: f64 = times[1..].iter().sum();
        println!(
            "{:<18}{:>12.3}{parts:>18.3}{:>8.2}",
            format!("{heads},{kv_heads},{d},{batch_invariant}"),
            times[0],
            times[0] / parts
        );
    }
    Ok(())
}
