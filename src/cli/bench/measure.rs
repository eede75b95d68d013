//! One shape on the device: verified against the oracle, then timed, its routes in turn.

use std::time::{Duration, Instant};

use qkv::Result;
use qkv::attention::{self, Options, Plan, Problem, Route, Tensors, View};
use qkv::doctor::Tolerance;
use qkv::gpu::{DType, Gpu, Limits, Recorder, Recording, Tensor};
use qkv::reference::{self, Attention, Offset};

use super::super::attend::route_name;
use super::report::{Entry, Spread};
use super::shape::Shape;

/// Multiply-adds that the oracle may take for a shape: a second or so.
const ORACLE: u64 = 1 << 29;
/// Rounds at the least and at the most.
const ROUNDS: [usize; 2] = [5, 200];

/// The tensors of a shape, as the device has them.
pub struct Inputs<'g> {
    gpu: &'g Gpu,
    shape: Shape,
    tensors: [Tensor; 4],
    values: [Vec<f32>; 3],
}

/// A way to compute a shape.
pub struct Way {
    pub plan: Plan,
    /// Whether the plan takes it of its own accord.
    pub chosen: bool,
    options: Options,
    scratch: Tensor,
    recording: Recording,
    first: Duration,
    /// Worst, in units of the tolerance, and how many rows were compared; or what is wrong.
    pub verdict: std::result::Result<(f64, usize), String>,
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

impl<'g> Inputs<'g> {
    pub fn new(gpu: &'g Gpu, shape: Shape) -> Result<Self> {
        let queries = [shape.batch, shape.heads, shape.q_len, shape.dim];
        let keys = [shape.batch, shape.kv_heads, shape.k_len, shape.dim];
        let extents = [queries, keys, keys];
        let count = |extents: [u32; 4]| extents.iter().map(|&n| n as usize).product();
        let dtype = shape.dtype();
        let values = [0, 1, 2].map(|ix| noise(ix as u64 + 1, count(extents[ix]), dtype));
        let upload = |ix: usize, name| gpu.upload_floats(name, dtype, &extents[ix], &values[ix]);
        Ok(Inputs {
            gpu,
            shape,
            tensors: [
                upload(0, "q")?,
                upload(1, "k")?,
                upload(2, "v")?,
                gpu.empty("out", dtype, &queries)?,
            ],
            values,
        })
    }

    fn views(&self) -> Result<Tensors<'_>> {
        let [q, k, v, out] = &self.tensors;
        Ok(Tensors::new(
            View::bhld(q)?,
            View::bhld(k)?,
            View::bhld(v)?,
            View::bhld(out)?,
        ))
    }

    /// Plans, compiles, runs once and verifies.
    pub fn way(&self, route: Option<Route>) -> Result<Way> {
        let options = Options {
            causal: self.shape.causal,
            route,
            ..Options::default()
        };
        let tensors = self.views()?;
        let started = Instant::now();
        let plan = attention::planned_on(self.gpu, &Problem::new(&tensors, &options)?)?;
        let own = Options {
            route: None,
            ..options.clone()
        };
        let own = attention::planned_on(self.gpu, &Problem::new(&tensors, &own)?)?;
        let words = u32::try_from(plan.scratch.max(1)).unwrap_or(u32::MAX);
        let scratch = self.gpu.empty("scratch", DType::U32, &[words])?;
        let recording = self.record(&options, &scratch)?;
        self.gpu.run(&recording)?;
        let first = started.elapsed();
        let verdict = self.verify()?;
        Ok(Way {
            chosen: plan.launches == own.launches,
            plan,
            options,
            scratch,
            recording,
            first,
            verdict,
        })
    }

    fn record(&self, options: &Options, scratch: &Tensor) -> Result<Recording> {
        let mut recorder = Recorder::new(self.gpu);
        attention::record_in(&mut recorder, &self.views()?, options, scratch)?;
        recorder.finish()
    }

    /// The worst error in units of the tolerance and the number of rows compared: all of them, or where that
    /// would take long some of every head, the first and the last among them.
    fn verify(&self) -> Result<std::result::Result<(f64, usize), String>> {
        let got = self.gpu.read_floats(&self.tensors[3])?;
        let Shape {
            batch,
            heads,
            kv_heads,
            causal,
            ..
        } = self.shape;
        let [q_len, k_len, d] =
            [self.shape.q_len, self.shape.k_len, self.shape.dim].map(|n| n as usize);
        let all_heads = (batch * heads) as usize;
        let a_row = 2 * k_len as u64 * d as u64 * all_heads as u64;
        let n = ((ORACLE / a_row) as usize).clamp(3, q_len.max(3));
        let mut rows: Vec<usize> = (0..n).map(|ix| ix * (q_len - 1) / (n - 1)).collect();
        rows.dedup();
        let tolerance = Tolerance::new(self.shape.dtype(), self.shape.k_len);
        let [q, k, v] = &self.values;
        let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
        let group = (heads / kv_heads) as usize;
        let mut worst = 0f64;
        for head in 0..all_heads {
            let kv = head / group * k_len * d;
            let (k, v) = (wide(&k[kv..][..k_len * d]), wide(&v[kv..][..k_len * d]));
            for &i in &rows {
                let at = (head * q_len + i) * d;
                let row = wide(&q[at..][..d]);
                let offset = [k_len as i64 - q_len as i64 + i as i64];
                let want = reference::attention(&Attention {
                    causal,
                    offset: Offset::PerRow(&offset),
                    ..Attention::new([1, 1, 1, d], [1, 1, k_len, d], &row, &k, &v)
                });
                let error = tolerance.worst(&got[at..][..d], &want.out);
                if error > 1.0 {
                    return Ok(Err(format!(
                        "head {head}, query {i} is off by {error:.1} times what is allowed"
                    )));
                }
                worst = worst.max(error);
            }
        }
        Ok(Ok((worst, rows.len() * all_heads)))
    }

    /// Times all ways in turn, `flush` before each run, for about so many seconds a way.
    pub fn time(
        &self,
        ways: &[Way],
        flush: &Recording,
        limits: &Limits,
        seconds: f64,
    ) -> Result<Vec<Entry>> {
        let mut times = vec![Vec::new(); ways.len()];
        let started = Instant::now();
        let enough = seconds * ways.len() as f64;
        for round in 0..ROUNDS[1] {
            if round >= ROUNDS[0] && started.elapsed().as_secs_f64() > enough {
                break;
            }
            for (way, times) in ways.iter().zip(&mut times) {
                self.gpu.run(flush)?;
                times.push(self.gpu.time(&way.recording)?.as_secs_f64() * 1e3);
            }
        }
        // Ratios are of runs that followed each other, so that what slows both down is in neither.
        let base = ways.iter().position(|way| way.chosen).unwrap_or(0);
        let mut entries = Vec::new();
        for (way, own) in ways.iter().zip(&times) {
            let ratios: Vec<f64> = own.iter().zip(&times[base]).map(|(a, b)| a / b).collect();
            let ratio = Spread::of(&ratios);
            let host = self.host(way)?;
            let entry = self.entry(way, own, &host, limits);
            let compared = ways.len() > 1 && !ratio.is_noisy() && !entry.ms.is_noisy();
            entries.push(Entry {
                ratio: compared.then_some(ratio.median),
                ..entry
            });
        }
        Ok(entries)
    }

    /// The host's milliseconds to record, encode and submit one.
    fn host(&self, way: &Way) -> Result<Vec<f64>> {
        let idle = Recorder::new(self.gpu).finish()?;
        let mut times = Vec::new();
        for _ in 0..ROUNDS[0] {
            let started = Instant::now();
            let recording = self.record(&way.options, &way.scratch)?;
            let device = self.gpu.device();
            let mut encoder = device.create_command_encoder(&Default::default());
            recording.encode(&mut encoder);
            self.gpu.queue().submit([encoder.finish()]);
            times.push(started.elapsed().as_secs_f64() * 1e3);
            self.gpu.run(&idle)?;
        }
        Ok(times)
    }

    fn entry(&self, way: &Way, times: &[f64], host: &[f64], limits: &Limits) -> Entry {
        let shape = self.shape;
        let spread = Spread::of(times);
        // What is stored in f16 may be multiplied in f32: the better of both is its limit.
        let f16 = limits.f16.filter(|_| shape.f16).unwrap_or(limits.f32);
        let most = limits.f32.flops.max(f16.flops);
        let most_read = limits.f32.read.max(f16.read);
        let seconds = spread.median / 1e3;
        let (flops, read) = (shape.flop() / seconds, shape.kv_bytes() / seconds);
        let (error, rows) = way.verdict.clone().unwrap_or((f64::INFINITY, 0));
        let plan = &way.plan;
        let mut kernels: Vec<&str> = plan.launches.iter().map(|one| one.shader.kernel).collect();
        kernels.dedup();
        let splits = match plan.splits {
            1 => String::new(),
            n => format!(", {n} parts of {} keys", plan.split_len),
        };
        Entry {
            shape,
            route: route_name(plan.route).into(),
            plan: format!("{}{splits}", kernels.join(" + ")),
            chosen: way.chosen,
            ratio: None,
            first_ms: way.first.as_secs_f64() * 1e3,
            ms: spread,
            host_ms: Spread::of(host).median,
            gflops: flops / 1e9,
            gb_s: read / 1e9,
            share: match shape.is_decode() {
                true => read / most_read,
                false => flops / most,
            },
            error,
            rows,
            times_ms: times.to_vec(),
        }
    }
}
