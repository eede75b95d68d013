//! One shape on the device: verified against the oracle, then timed, its routes and its peers in turn.

use std::cell::OnceCell;
use std::time::{Duration, Instant};

use qkv::attention::{self, Options, Plan, Problem, Route, Tensors, View};
use qkv::doctor::Tolerance;
use qkv::gpu::{DType, Gpu, Recorder, Recording, Tensor};
use qkv::reference::{self, Attention, Offset};
use qkv::{Error, Result};

use super::super::Floats;
use super::super::attend::route_name;
use super::peers::Peer;
use super::report::{self, Entry, Limits, Refused, Spread, ratio};
use super::shape::Shape;

/// Multiply-adds that the oracle may take for a shape: a second or so.
const ORACLE: u64 = 1 << 29;
/// Rounds at the least and at the most.
const ROUNDS: [usize; 2] = [5, 200];
/// What a peer's largest error may be, in f32 and in f16, as a part of the answer's root mean square. Some add
/// up in f16.
const RIGHT: [f64; 2] = [1e-3, 5e-2];
/// Longer than threads of a peer spin after a call, waiting for another.
const SETTLE: Duration = Duration::from_millis(250);

/// The tensors of a shape, as the device has them.
pub struct Inputs<'g> {
    gpu: &'g Gpu,
    shape: Shape,
    tensors: [Tensor; 4],
    extents: [[u32; 4]; 3],
    values: [Vec<f32>; 3],
    truth: OnceCell<Vec<Row>>,
}

/// A row of the exact answer.
struct Row {
    head: usize,
    query: usize,
    values: Vec<f64>,
}

/// An answer beside the oracle's.
struct Judged {
    /// The worst row in units of the tolerance, and where it is.
    worst: f64,
    head: usize,
    query: usize,
    /// How many were compared.
    rows: usize,
    /// The largest error and the root mean square of all, as parts of the oracle's root mean square.
    max_of_rms: f64,
    rms_of_rms: f64,
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

/// Refuses what the device has no room for, before the host makes room for it: a tensor in one buffer, and in one
/// binding its part of one KV head, which launches are not cut below.
fn fits(gpu: &Gpu, shape: &Shape) -> Result<()> {
    let group = shape.heads / shape.kv_heads;
    for (name, rows) in [("q", [group, shape.q_len]), ("k", [1, shape.k_len])] {
        let head = [rows[0], rows[1], shape.dim, shape.dtype().size() as u32];
        let head: u64 = head.map(u64::from).iter().product();
        let all = u64::from(shape.batch) * u64::from(shape.kv_heads) * head;
        let caps = gpu.caps();
        for (what, bytes, most) in [
            ("in one buffer", all, caps.max_buffer),
            ("of one KV head in one binding", head, caps.max_binding),
        ] {
            if bytes > most {
                return Err(Error::refused(
                    name,
                    format_args!("{bytes} bytes {what}"),
                    format!("this device allows {most}"),
                ));
            }
        }
    }
    Ok(())
}

impl<'g> Inputs<'g> {
    pub fn new(gpu: &'g Gpu, shape: Shape) -> Result<Self> {
        fits(gpu, &shape)?;
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
            extents,
            values,
            truth: OnceCell::new(),
        })
    }

    /// q, k and v, for a file.
    pub fn floats(&self) -> Vec<Floats> {
        let all = ["q", "k", "v"]
            .into_iter()
            .zip(&self.extents)
            .zip(&self.values);
        let floats = all.map(|((name, extents), values)| Floats {
            name: name.to_string(),
            shape: extents.to_vec(),
            values: values.clone(),
        });
        floats.collect()
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
        let recorded = started.elapsed();
        self.poison()?;
        let started = Instant::now();
        self.gpu.run(&recording)?;
        let first = recorded + started.elapsed();
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

    /// Makes what is not written NaN, in every type, rather than another way's right answer.
    fn poison(&self) -> Result<()> {
        let out = &self.tensors[3];
        let bytes = out.bytes() as usize / 4 * 4;
        self.gpu.write(out, &vec![0xff; bytes])
    }

    /// Runs it once more on its own and verifies.
    fn again(&self, recording: &Recording) -> Result<std::result::Result<(f64, usize), String>> {
        self.poison()?;
        self.gpu.run(recording)?;
        let verdict = self.verify()?;
        Ok(verdict.map_err(|said| format!("after it was timed: {said}")))
    }

    /// The worst error in units of the tolerance and the number of rows compared.
    fn verify(&self) -> Result<std::result::Result<(f64, usize), String>> {
        let got = self.gpu.read_floats(&self.tensors[3])?;
        let judged = self.judge(&got);
        let (worst, head, query) = (judged.worst, judged.head, judged.query);
        Ok(match worst > 1.0 {
            true => Err(format!(
                "head {head}, query {query} is off by {worst:.1} times what is allowed"
            )),
            false => Ok((worst, judged.rows)),
        })
    }

    /// The rows that answers are held against: all of them, or where that would take long some of every head,
    /// the first and the last among them.
    fn oracle(&self) -> Vec<Row> {
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
        let mut queries: Vec<usize> = (0..n).map(|ix| ix * (q_len - 1) / (n - 1)).collect();
        queries.dedup();
        let [q, k, v] = &self.values;
        let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
        let group = (heads / kv_heads) as usize;
        let mut rows = Vec::new();
        for head in 0..all_heads {
            let kv = head / group * k_len * d;
            let (k, v) = (wide(&k[kv..][..k_len * d]), wide(&v[kv..][..k_len * d]));
            for &query in &queries {
                let row = wide(&q[(head * q_len + query) * d..][..d]);
                let offset = [k_len as i64 - q_len as i64 + query as i64];
                let answer = reference::attention(&Attention {
                    causal,
                    offset: Offset::PerRow(&offset),
                    ..Attention::new([1, 1, 1, d], [1, 1, k_len, d], &row, &k, &v)
                });
                rows.push(Row {
                    head,
                    query,
                    values: answer.out,
                });
            }
        }
        rows
    }

    fn judge(&self, got: &[f32]) -> Judged {
        let rows = self.truth.get_or_init(|| self.oracle());
        let [q_len, d] = [self.shape.q_len, self.shape.dim].map(|n| n as usize);
        let tolerance = Tolerance::new(self.shape.dtype(), self.shape.k_len);
        let mut judged = Judged {
            worst: 0.0,
            head: 0,
            query: 0,
            rows: rows.len(),
            max_of_rms: 0.0,
            rms_of_rms: 0.0,
        };
        let (mut largest, mut wrong, mut exact) = (0f64, 0.0, 0.0);
        for row in rows {
            let got = &got[(row.head * q_len + row.query) * d..][..d];
            let error = tolerance.worst(got, &row.values);
            if error > judged.worst {
                (judged.worst, judged.head, judged.query) = (error, row.head, row.query);
            }
            for (&got, want) in got.iter().zip(&row.values) {
                let error = f64::from(got) - want;
                largest = largest.max(error.abs());
                wrong += error * error;
                exact += want * want;
            }
        }
        let rms = (exact / (rows.len() * d) as f64).sqrt();
        judged.max_of_rms = largest / rms;
        judged.rms_of_rms = (wrong / exact).sqrt();
        judged
    }

    /// Times all ways and peers in turn, `flush` before each run, for about so many seconds each, and verifies the
    /// ways again. One whose answer is then wrong has no entry, and its verdict says so. A peer that fails is among
    /// what was not measured.
    pub fn time(
        &self,
        ways: &mut [Way],
        peers: &mut [Peer],
        flush: &Recording,
        limits: &Limits,
        seconds: f64,
    ) -> Result<(Vec<Entry>, Vec<Refused>)> {
        let mut times = vec![Vec::new(); ways.len()];
        // The plan's own choice once more in each round by the host's clock, which peers without the device's go by.
        let base = ways.iter().position(|way| way.chosen);
        let mut waited = Vec::new();
        let started = Instant::now();
        let enough = seconds * (ways.len() + peers.len()) as f64;
        for round in 0..ROUNDS[1] {
            if round >= ROUNDS[0] && started.elapsed().as_secs_f64() > enough {
                break;
            }
            for (way, times) in ways.iter().zip(&mut times) {
                self.gpu.run(flush)?;
                times.push(self.gpu.time(&way.recording)?.as_secs_f64() * 1e3);
            }
            if let Some(ix) = base.filter(|_| !peers.is_empty()) {
                self.gpu.run(flush)?;
                let started = Instant::now();
                self.gpu.run(&ways[ix].recording)?;
                waited.push(started.elapsed().as_secs_f64() * 1e3);
            }
            for peer in peers.iter_mut() {
                self.gpu.run(flush)?;
                peer.call();
            }
            if !peers.is_empty() {
                std::thread::sleep(SETTLE);
            }
        }
        for way in ways.iter_mut() {
            way.verdict = self.again(&way.recording)?;
        }
        // Without the plan's own choice, or where it is wrong, there is nothing to hold the others against.
        let base = base.filter(|&ix| ways[ix].verdict.is_ok());
        let (base, waited) = base.map_or((&[][..], &[][..]), |ix| (&times[ix], &waited));
        let (mut entries, mut refused) = (Vec::new(), Vec::new());
        let right = ways.iter().zip(&times);
        for (way, own) in right.filter(|(way, _)| way.verdict.is_ok()) {
            let alone = ways.len() + peers.len() == 1;
            match self.entry(way, own, &self.host(way)?, limits) {
                Ok(entry) => entries.push(Entry {
                    ratio: ratio(own, base).filter(|_| !alone),
                    ..entry
                }),
                Err(why) => refused.push(Refused {
                    shape: self.shape,
                    route: route_name(way.plan.route).into(),
                    why,
                }),
            }
        }
        for peer in peers {
            match self.peer_entry(peer, limits) {
                Ok(mut entry) => {
                    let base = match &mut entry.peer {
                        Some(about) if !about.timestamps && !waited.is_empty() => {
                            about.ours_waited_ms = Some(Spread::of(waited).median);
                            entry.plan = about.to_string();
                            waited
                        }
                        _ => base,
                    };
                    entry.ratio = ratio(&entry.times_ms, base).filter(|_| entry.is_right());
                    entries.push(entry);
                }
                Err(why) => refused.push(Refused {
                    shape: self.shape,
                    route: peer.name.word().into(),
                    why,
                }),
            }
        }
        Ok((entries, refused))
    }

    /// What a peer measured, and what its answer is worth.
    fn peer_entry(&self, peer: &mut Peer, limits: &Limits) -> std::result::Result<Entry, String> {
        let timed = peer.end(&self.shape)?;
        let judged = self.judge(&timed.out);
        let about = report::Peer {
            about: peer.about.clone(),
            timestamps: timed.timestamps,
            ours_waited_ms: None,
            max_error: judged.max_of_rms,
            rms_error: judged.rms_of_rms,
            right: judged.max_of_rms <= RIGHT[usize::from(self.shape.f16)],
        };
        let entry = Entry {
            plan: about.to_string(),
            peer: Some(about),
            route: peer.name.word().into(),
            first_ms: peer.first_ms,
            error: judged.worst,
            rows: judged.rows,
            ..self.figures(&timed.times_ms, limits)?
        };
        Ok(match peer.name.is_on_device() {
            true => entry,
            false => Entry {
                share: None,
                limit_noisy: false,
                ..entry
            },
        })
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

    fn entry(
        &self,
        way: &Way,
        times: &[f64],
        host: &[f64],
        limits: &Limits,
    ) -> std::result::Result<Entry, String> {
        let (error, rows) = way.verdict.clone().unwrap_or((f64::INFINITY, 0));
        let plan = &way.plan;
        let mut kernels: Vec<&str> = plan.launches.iter().map(|one| one.shader.kernel).collect();
        kernels.dedup();
        let splits = match plan.splits {
            1 => String::new(),
            n => format!(", {n} parts of {} keys", plan.split_len),
        };
        let tuned = if plan.tuned { ", tuned" } else { "" };
        Ok(Entry {
            route: route_name(plan.route).into(),
            plan: format!("{}{splits}{tuned}", kernels.join(" + ")),
            candidate: plan.candidate.to_string(),
            tuned: plan.tuned,
            chosen: way.chosen,
            first_ms: way.first.as_secs_f64() * 1e3,
            host_ms: Some(Spread::of(host).median),
            error,
            rows,
            ..self.figures(times, limits)?
        })
    }

    /// What follows from the times alone; or why nothing does.
    fn figures(&self, times: &[f64], limits: &Limits) -> std::result::Result<Entry, String> {
        let shape = self.shape;
        // Clocks tell no more than nanoseconds.
        let times_ms: Vec<f64> = times.iter().map(|ms| (ms * 1e6).round() / 1e6).collect();
        let spread = Spread::of(&times_ms);
        // It has no rate: an infinite one is no number of JSON's.
        if spread.median <= 0.0 {
            return Err("the clock is too coarse for it: half of its times are 0".into());
        }
        let seconds = spread.median / 1e3;
        let (flops, read) = (shape.flop() / seconds, shape.kv_bytes() / seconds);
        let mut entry = Entry {
            shape,
            route: String::new(),
            plan: String::new(),
            candidate: String::new(),
            tuned: false,
            chosen: false,
            ratio: None,
            first_ms: 0.0,
            ms: spread,
            host_ms: None,
            gflops: flops / 1e9,
            gb_s: read / 1e9,
            share: None,
            limit_noisy: false,
            error: 0.0,
            rows: 0,
            times_ms,
            peer: None,
        };
        limits.judge(&mut entry);
        Ok(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_writes_nothing_is_wrong_after_a_right_answer() {
        let gpu = Gpu::new().expect("a device: see scripts/with-gpu");
        let shape = "1,2,2,3,40,16".parse().unwrap();
        let inputs = Inputs::new(&gpu, shape).unwrap();
        let mut ways = vec![inputs.way(None).unwrap()];
        assert!(ways[0].verdict.is_ok());
        assert!(inputs.again(&ways[0].recording).unwrap().is_ok());
        // The right answer is still there.
        ways[0].recording = Recorder::new(&gpu).finish().unwrap();
        assert!(inputs.verify().unwrap().is_ok());
        let flush = Recorder::new(&gpu).finish().unwrap();
        let rates = report::Rates {
            gflops: 1.0,
            read_gb_s: 1.0,
            copy_gb_s: 1.0,
            noise: [0.0; 3],
        };
        let limits = Limits {
            f32: rates,
            f16: None,
        };
        let (entries, _) = inputs
            .time(&mut ways, &mut [], &flush, &limits, 0.0)
            .unwrap();
        assert!(entries.is_empty());
        let said = ways[0].verdict.as_ref().unwrap_err();
        assert!(said.contains("after it was timed: head 0"), "{said}");
        // Nor has what no clock sees an entry, with rates without end.
        let why = inputs.figures(&[0.0, 0.0, 0.0, 1.0], &limits).err();
        assert!(why.is_some_and(|why| why.contains("too coarse")));
        assert!(inputs.figures(&[1.0; 4], &limits).is_ok());
    }
}
