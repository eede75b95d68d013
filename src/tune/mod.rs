//! Finds the best way to compute a shape by measuring, and keeps it for the device.
//!
//! Nothing needs it: without it a table by capabilities chooses. It runs when it is asked to, by [`shape`] or
//! `qkv tune`, and never on its own; [`attention::record`](crate::attention::record) takes what it found from
//! then on, and so does every later [`Gpu::new`] on a device of the same name, driver and backend, as long as
//! the shaders are the same. Batch-invariant and forced plans are never tuned, and [`Gpu::untuned`] leaves
//! everything to the table.
//!
//! Candidates are data ([`Candidate`]). Each is run once, held against the f64 oracle in some rows and
//! against the others everywhere, the oracle once more where they differ, and only then timed: on the device's clock where it has one, in turns, by
//! the median of several; losers are dropped after few. First the kernels, then the best one's splits.

mod job;
mod shape;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

pub use shape::{SHAPES, Shape, default_shapes};

use crate::Result;
use crate::attention::Candidate;
use crate::gpu::{Gpu, Recording};
use job::Job;

/// What was found for a shape.
#[derive(Clone, Debug)]
pub struct Tuned {
    /// The problems that it holds for, as [`Problem::bucket`](crate::attention::Problem::bucket) says.
    pub bucket: String,
    /// The best.
    pub chosen: Candidate,
    /// What the table by capabilities takes.
    pub table: Candidate,
    /// Heads of all batch rows that were measured, and that there are: a shape that takes long is measured on a part
    /// of them.
    pub heads: [u32; 2],
    /// All that were timed, on those heads: those that were to the end, the fastest first, then those that were
    /// dropped.
    pub ranking: Vec<(Candidate, Duration)>,
    /// What was not timed, and why: a wrong answer, or a refusal of the device's.
    pub rejected: Vec<(Candidate, String)>,
    /// How long the first run of each kernel took, in which drivers compile, and its check.
    pub first: Duration,
    /// How long all else took.
    pub measured: Duration,
}

/// Seconds that the kernels are timed for.
const KERNELS_FOR: f64 = 0.6;
/// Seconds that the best kernel's splits are timed for.
const SPLITS_FOR: f64 = 0.5;
/// Seconds of one run past which a shape is measured on a part of its heads, if that part keeps the device busy.
const LONG: f64 = 0.03;
/// Workgroups of the table's choice that such a part keeps: they keep a large device busy, or a processor.
const KEPT_GROUPS: [u64; 2] = [256, 32];
/// Runs of each candidate that is not dropped, at most.
const ROUNDS: usize = 40;
/// How much faster than the table's choice another must be to take its place: less is noise.
const BETTER: f64 = 0.97;

/// Measures a shape and keeps what was found for this device, in memory and in the file that
/// [`Gpu::choices_path`] names.
///
/// # Errors
/// [`crate::Error::Refused`] for a shape that attention refuses; [`crate::Error::File`] where the file
/// cannot be written.
pub fn shape(gpu: &Gpu, shape: &Shape) -> Result<Tuned> {
    let tuned = measure(gpu, shape)?;
    let choice = tuned.to_string();
    gpu.keep_choices(&BTreeMap::from([(tuned.bucket.clone(), choice)]))?;
    Ok(tuned)
}

/// Measures a shape and keeps nothing. It takes less than two seconds besides the first runs of kernels that
/// the driver has not compiled before.
///
/// # Errors
/// [`crate::Error::Refused`] for a shape that attention refuses.
pub fn measure(gpu: &Gpu, shape: &Shape) -> Result<Tuned> {
    let started = Instant::now();
    let whole = Job::empty(gpu, shape)?;
    let (bucket, kernels, parts) = (whole.bucket()?, whole.kernels()?, whole.parts()?);
    drop(whole);
    let table = kernels[0];
    // The least part tells how long the others would take.
    let least = *parts.last().unwrap_or(shape);
    let mut job = Job::new(gpu, &least)?;
    let first = Instant::now();
    let recording = job.record(table)?;
    gpu.run(&recording)?;
    let first = first.elapsed();
    let a_head = gpu.time(&recording)?.as_secs_f64() / least.all_heads();
    let mut parts = parts.into_iter();
    let part = parts.find(|part| part.all_heads() * a_head <= LONG);
    if let Some(part) = part.filter(|part| *part != least) {
        job = Job::new(gpu, &part)?;
    }
    let mut contest = Contest::new(job);
    let heads = [&contest.job.shape, shape].map(|shape| shape.batch.saturating_mul(shape.heads));
    contest.first = first;
    for candidate in kernels {
        contest.enter(candidate)?;
    }
    contest.time(KERNELS_FOR, table)?;
    if let Some(best) = contest.best(table) {
        let others = contest.job.other_splits(best)?;
        if !others.is_empty() {
            contest.start_anew([best, table]);
            for candidate in others {
                contest.enter(candidate)?;
            }
            contest.time(SPLITS_FOR, table)?;
        }
    }
    let tuned = Tuned {
        bucket,
        chosen: contest.best(table).unwrap_or(table),
        table,
        heads,
        ranking: contest.ranking(),
        rejected: contest.rejected,
        first: contest.first,
        measured: started.elapsed().saturating_sub(contest.first),
    };
    tracing::info!(bucket = tuned.bucket, choice = %tuned, "tuned");
    Ok(tuned)
}

/// The choice, its time, and the runner-up's: what is saved.
impl std::fmt::Display for Tuned {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let ms = |duration: &Duration| duration.as_secs_f64() * 1e3;
        write!(f, "{}", self.chosen)?;
        let mut ranking = self.ranking.iter();
        if let Some((_, time)) = ranking.find(|(candidate, _)| *candidate == self.chosen) {
            write!(f, "; {:.3} ms", ms(time))?;
        }
        let mut others = self.ranking.iter();
        if let Some((other, time)) = others.find(|(candidate, _)| *candidate != self.chosen) {
            write!(f, ", and {:.3} ms by {other}", ms(time))?;
        }
        let [measured, all] = self.heads;
        match measured == all || self.ranking.is_empty() {
            true => Ok(()),
            false => write!(f, "; of {measured}/{all} of its heads"),
        }
    }
}

/// A candidate that has answered right.
struct Entry {
    candidate: Candidate,
    recording: Recording,
    seconds: Vec<f64>,
}

impl Entry {
    fn median(&self) -> f64 {
        let mut seconds = self.seconds.clone();
        seconds.sort_by(f64::total_cmp);
        let middle = seconds.get(seconds.len() / 2);
        middle.copied().unwrap_or(f64::INFINITY)
    }

    fn least(&self) -> f64 {
        self.seconds.iter().copied().fold(f64::INFINITY, f64::min)
    }
}

/// Candidates for one job.
struct Contest<'a> {
    job: Job<'a>,
    entries: Vec<Entry>,
    /// With the median of what was timed of them.
    dropped: Vec<(Candidate, f64)>,
    rejected: Vec<(Candidate, String)>,
    first: Duration,
}

impl<'a> Contest<'a> {
    fn new(job: Job<'a>) -> Self {
        Contest {
            job,
            entries: Vec::new(),
            dropped: Vec::new(),
            rejected: Vec::new(),
            first: Duration::ZERO,
        }
    }

    /// Compiles a candidate and lets it in, unless it is there.
    fn enter(&mut self, candidate: Candidate) -> Result<()> {
        if self
            .entries
            .iter()
            .any(|entry| entry.candidate == candidate)
        {
            return Ok(());
        }
        let started = Instant::now();
        match self.job.record(candidate) {
            Ok(recording) => self.admit(candidate, recording)?,
            // The device may be gone, or lack room for this one alone.
            Err(e @ crate::Error::DeviceLost(_)) => return Err(e),
            Err(e) => self.reject(candidate, e.to_string()),
        }
        self.first += started.elapsed();
        Ok(())
    }

    /// Lets a candidate in if it answers right.
    fn admit(&mut self, candidate: Candidate, recording: Recording) -> Result<()> {
        match self.job.check(&recording)? {
            Ok(()) => self.entries.push(Entry {
                candidate,
                recording,
                seconds: Vec::new(),
            }),
            Err(why) => self.reject(candidate, why),
        }
        while self.job.take_doubt() {
            for entry in std::mem::take(&mut self.entries) {
                match self.job.check(&entry.recording)? {
                    Ok(()) => self.entries.push(entry),
                    Err(why) => self.reject(entry.candidate, why),
                }
            }
        }
        Ok(())
    }

    fn reject(&mut self, candidate: Candidate, why: String) {
        tracing::warn!(%candidate, why, "not for this device");
        self.rejected.push((candidate, why));
    }

    /// Runs the entries in turns, for so many seconds or until one is left. The table's choice stays for long
    /// enough to be beaten for sure.
    fn time(&mut self, seconds: f64, table: Candidate) -> Result<()> {
        let started = Instant::now();
        for round in 1..=ROUNDS {
            for entry in &mut self.entries {
                let time = self.job.gpu.time(&entry.recording)?;
                entry.seconds.push(time.as_secs_f64());
            }
            // Who runs first in a round may have it easier.
            self.entries.reverse();
            // Others' work makes a run slower and never faster, so that the least time tells losers early.
            let slack = match round {
                1 | 2 => 2.5,
                3..6 => 1.5,
                _ => 1.2,
            };
            let least = self.entries.iter().map(Entry::least);
            let bound = slack * least.fold(f64::INFINITY, f64::min);
            let slow = self.entries.extract_if(.., |entry| {
                entry.least() > bound && (entry.candidate != table || round >= 5)
            });
            self.dropped
                .extend(slow.map(|entry| (entry.candidate, entry.median())));
            let out = started.elapsed().as_secs_f64() > seconds;
            if self.entries.len() <= 1 || out {
                break;
            }
        }
        Ok(())
    }

    /// The fastest; the table's choice unless others beat it for sure, in rounds that both ran in.
    fn best(&self, table: Candidate) -> Option<Candidate> {
        let others = self.entries.iter().filter(|e| e.candidate != table);
        let Some(table) = self.entries.iter().find(|e| e.candidate == table) else {
            return others
                .min_by(|a, b| a.median().total_cmp(&b.median()))
                .map(|entry| entry.candidate);
        };
        let ratios = others.filter_map(|entry| {
            let rounds = entry.seconds.iter().zip(&table.seconds);
            let mut ratios: Vec<f64> = rounds.map(|(a, b)| a / b).collect();
            let wins = ratios.iter().filter(|&&ratio| ratio < 1.0).count() as f64;
            ratios.sort_by(f64::total_cmp);
            // More than half of the rounds by 2.2 of a coin's standard deviations: five of five, 13 of 16.
            let n = ratios.len() as f64;
            let sure = wins >= n / 2.0 + 1.1 * n.sqrt();
            sure.then(|| (ratios[ratios.len() / 2], entry.candidate))
        });
        let best = ratios.min_by(|a, b| a.0.total_cmp(&b.0));
        let best = best.filter(|&(ratio, _)| ratio < BETTER);
        Some(best.map_or(table.candidate, |(_, candidate)| candidate))
    }

    /// All but these leave, and they are timed anew, beside those that come.
    fn start_anew(&mut self, stay: [Candidate; 2]) {
        let leave = |entry: &mut Entry| !stay.contains(&entry.candidate);
        let gone = self.entries.extract_if(.., leave);
        self.dropped
            .extend(gone.map(|entry| (entry.candidate, entry.median())));
        for entry in &mut self.entries {
            entry.seconds.clear();
        }
    }

    fn ranking(&self) -> Vec<(Candidate, Duration)> {
        let entries = self.entries.iter();
        let mut ranking: Vec<(Candidate, f64)> = entries
            .map(|entry| (entry.candidate, entry.median()))
            .collect();
        ranking.sort_by(|a, b| a.1.total_cmp(&b.1));
        let mut dropped = self.dropped.clone();
        dropped.sort_by(|a, b| a.1.total_cmp(&b.1));
        ranking.extend(dropped);
        let ranking = ranking.into_iter();
        ranking
            .map(|(candidate, seconds)| (candidate, Duration::from_secs_f64(seconds)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Options, Route, Subgroups};

    #[test]
    fn times_of_a_part_of_the_heads_say_so() {
        let chosen: Candidate = "prefill, 2 rows".parse().unwrap();
        let other: Candidate = "prefill, 1 rows".parse().unwrap();
        let ranking = [(chosen, 1250), (other, 1500)];
        let mut tuned = Tuned {
            bucket: String::new(),
            chosen,
            table: other,
            heads: [8, 32],
            ranking: ranking.map(|(c, us)| (c, Duration::from_micros(us))).into(),
            rejected: Vec::new(),
            first: Duration::ZERO,
            measured: Duration::ZERO,
        };
        let text = tuned.to_string();
        let times = "prefill, 2 rows; 1.250 ms, and 1.500 ms by prefill, 1 rows";
        assert_eq!(text, format!("{times}; of 8/32 of its heads"));
        // What reads it back takes what stands before.
        let back: Candidate = text.split(';').next().unwrap().parse().unwrap();
        assert_eq!(back, chosen);
        tuned.heads = [32, 32];
        assert_eq!(tuned.to_string(), times);
    }

    #[test]
    fn a_wrong_candidate_is_thrown_out_however_fast_it_is() {
        let gpu = Gpu::new()
            .expect("a device: see scripts/with-gpu")
            .untuned();
        let shape: Shape = "1,2,2,70,190,20".parse().unwrap();
        let job = Job::new(&gpu, &shape).unwrap();
        let kernels = job.kernels().unwrap();
        assert!(kernels.len() >= 2, "{kernels:?}");
        // Another law, which is half the work; and nothing at all.
        let causal = Options {
            causal: true,
            ..Options::default()
        };
        let other_law = job.record_with(kernels[1], &causal).unwrap();
        let nothing = crate::gpu::Recorder::new(&gpu).finish().unwrap();
        let planted = Candidate {
            route: Route::Decode,
            subgroups: Subgroups::Unused,
            rows: 1,
            keys: 1,
            splits: 1,
            f16_math: false,
        };
        let mut contest = Contest::new(job);
        contest.admit(planted, other_law).unwrap();
        contest.admit(planted, nothing).unwrap();
        assert_eq!((contest.entries.len(), contest.rejected.len()), (0, 2));
        for candidate in kernels {
            contest.enter(candidate).unwrap();
        }
        assert_eq!(contest.rejected.len(), 2, "{:?}", contest.rejected);
        contest.time(0.1, planted).unwrap();
        assert_ne!(contest.best(planted), Some(planted));
        assert!(contest.best(planted).is_some());
    }
}
