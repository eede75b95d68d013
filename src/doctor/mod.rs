//! Whether a device's kernels give right answers, and what is not used of it where they do not.
//!
//! [`examine`] runs every route and variant that a device could choose on small hard problems, each beside the
//! oracle. Its short form runs once for each device and driver, when [`Gpu::choose`] first opens it, on the
//! kernels of powers that drivers have got wrong before: subgroup operations, `f16`, and cooperative matrices.
//! What it found is kept in the user's cache directory, and a power whose kernels were wrong is taken from
//! [`Gpu::caps`], so that no plan uses it; a warning says so. A power whose examination has ended two processes
//! counts as wrong too, until `qkv doctor` looks at it again. In a device of the caller's nothing is run unasked, and
//! its matrices are not used: [`Gpu::self_tested`] asks.

mod attempts;
mod problems;
mod product;
mod tolerance;
mod verdict;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use attempts::Attempts;
pub use problems::Hard;
use problems::Prepared;
pub use tolerance::Tolerance;
pub use verdict::{Finding, Verdict};

use crate::attention::Route;
use crate::gpu::{Caps, DType, Gpu};
use crate::{Error, Result};

/// One problem on one route.
#[derive(Clone, Debug)]
pub struct Check {
    /// The problem.
    pub hard: Hard,
    /// How q and out, and k and v, are stored.
    pub storage: [DType; 2],
    /// The route.
    pub route: Route,
    /// The kernels that ran; none where it did not come to that.
    pub kernels: Vec<&'static str>,
    /// Whether kernels with subgroup operations were to be had.
    pub subgroups: bool,
    /// Whether the products were to be had on cooperative matrices.
    pub matrices: bool,
    /// The worst error in units of what is allowed, or what is wrong.
    pub outcome: std::result::Result<f64, String>,
    /// What it took, compilers included.
    pub time: Duration,
}

impl Check {
    fn new(gpu: &Gpu, prepared: &Prepared, route: Route) -> Result<Check> {
        let started = Instant::now();
        let (kernels, outcome) = match prepared.run(gpu, route) {
            Ok((plan, outcome)) => {
                let kernels = plan.launches.iter().map(|launch| launch.shader.kernel);
                (kernels.collect(), outcome)
            }
            // No word on the kernels.
            Err(error @ (Error::OutOfMemory(_) | Error::Refused { .. })) => return Err(error),
            Err(error) => (Vec::new(), Err(error.to_string())),
        };
        Ok(Check {
            hard: prepared.hard,
            storage: prepared.storage,
            route,
            kernels,
            subgroups: gpu.caps().subgroups.is_some(),
            matrices: route == Route::Prefill
                && prepared.storage == [DType::F16; 2]
                && gpu.caps().matrix_form().is_some(),
            outcome,
            time: started.elapsed(),
        })
    }
}

/// What [`examine`] found.
pub struct Report {
    /// The device, without the powers whose kernels are wrong.
    pub gpu: Gpu,
    /// What its driver claims.
    pub claimed: Caps,
    /// Every check.
    pub checks: Vec<Check>,
    /// What follows for the powers.
    pub verdict: Verdict,
}

/// How q and out, and k and v, are stored, and problems that are run so, together where they share their variants.
/// A variant takes a compiler up to seconds, so each storage has those that differ by it.
const JOBS: [([DType; 2], &[Hard]); 11] = [
    ([DType::F32; 2], &[Hard::Lengths, Hard::Loud]),
    ([DType::F32; 2], &[Hard::Odd]),
    ([DType::F32; 2], &[Hard::Masked]),
    ([DType::F32; 2], &[Hard::Parts]),
    ([DType::F16; 2], &[Hard::Lengths, Hard::Loud]),
    ([DType::F16; 2], &[Hard::Odd]),
    ([DType::F16; 2], &[Hard::Wide]),
    ([DType::BF16; 2], &[Hard::Lengths, Hard::Loud]),
    ([DType::BF16; 2], &[Hard::Odd]),
    ([DType::F32, DType::Q8_0], &[Hard::Parts]),
    ([DType::F32, DType::Q4_0], &[Hard::Parts]),
];
/// Devices that jobs run on at once: compilers are what takes the time.
const DEVICES: usize = 4;

/// Runs every route on every problem in every storage type, with subgroup operations and without, on the
/// device that [`Gpu::choose`] would take, opened once a processor up to four times, and remembers the verdict.
/// `see` hears of each check as it ends; the report has them in order.
///
/// # Errors
/// [`Error::NoAdapter`], [`Error::OutOfMemory`] and [`Error::DeviceLost`]; a wrong answer is none.
pub fn examine(wanted: Option<&str>, see: &mut dyn FnMut(&Check)) -> Result<Report> {
    // By the table: what was tuned is another question.
    let open = || -> Result<Gpu> {
        let gpu = Gpu::open(wanted)?;
        Ok(gpu.narrowed(gpu.caps().with_matrices()).untuned())
    };
    let gpu = open()?;
    let claimed = gpu.caps().clone();
    let devices = std::thread::available_parallelism().map_or(1, |n| n.get().min(DEVICES));
    let next = AtomicUsize::new(0);
    let mut found = std::thread::scope(|scope| -> Result<Vec<(usize, Check)>> {
        let (tell, hear) = mpsc::channel();
        for ix in 0..devices {
            let (tell, next, open, gpu) = (tell.clone(), &next, &open, gpu.clone());
            scope.spawn(move || {
                let work = || -> Result<()> {
                    let gpu = match ix {
                        0 => gpu,
                        _ => open()?,
                    };
                    loop {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        let Some(&(storage, problems)) = JOBS.get(at) else {
                            return Ok(());
                        };
                        let mut heard = true;
                        examine_job(&gpu, storage, problems, &mut |check| {
                            heard = tell.send(Ok((at, check))).is_ok();
                        })?;
                        // Another one's error has ended it all.
                        if !heard {
                            return Ok(());
                        }
                    }
                };
                if let Err(e) = work() {
                    let _ = tell.send(Err(e));
                }
            });
        }
        drop(tell);
        let mut found = Vec::new();
        for one in hear {
            let (at, check) = one?;
            see(&check);
            found.push((at, check));
        }
        Ok(found)
    })?;
    found.sort_by_key(|&(at, _)| at);
    let checks: Vec<Check> = found.into_iter().map(|(_, check)| check).collect();
    let mut verdict = Verdict::of(&checks);
    if verdict.matrices == Finding::Right {
        verdict.matrices = product::examine(&gpu)?;
    }
    let identity = gpu.identity();
    if let Some(folder) = folder() {
        verdict.remember(&folder, &identity);
    }
    known().insert(identity, verdict.clone());
    Ok(Report {
        gpu: verdict.narrow(&gpu),
        claimed,
        checks,
        verdict,
    })
}

/// Every route on some problems, with subgroup operations and without.
fn examine_job(
    gpu: &Gpu,
    storage: [DType; 2],
    problems: &[Hard],
    see: &mut dyn FnMut(Check),
) -> Result<()> {
    let claimed = gpu.caps();
    let f16 = storage.contains(&DType::F16);
    let matrices = f16 && claimed.matrix_form().is_some();
    if f16 && !claimed.f16 || problems == [Hard::Wide] && !matrices {
        return Ok(());
    }
    // What stands in for a power is looked at where that power's kernels are; the three passes have none to do without,
    // and where subgroup operations are right, what stands in for them is not what runs.
    let fused = [Route::Prefill, Route::Decode];
    let mut forms = vec![(gpu.clone(), Route::ALL.as_slice())];
    if claimed.subgroups.is_some() && storage == [DType::F32; 2] {
        forms.push((gpu.narrowed(claimed.without_subgroups()), &fused));
    }
    if matrices {
        forms.push((gpu.narrowed(claimed.without_matrices()), &fused[..1]));
    }
    for &hard in problems {
        let prepared = Prepared::new(gpu, hard, storage)?;
        for (gpu, routes) in &forms {
            for &route in *routes {
                see(Check::new(gpu, &prepared, route)?);
            }
        }
    }
    Ok(())
}

/// What is known to go wrong on such a device and is kept from happening, a line each.
pub fn avoided(caps: &Caps) -> Vec<&'static str> {
    match caps.software {
        true => vec![
            "Mesa's software driver before 25 ends every loop, without a word, once a thread has taken 65,535 \
             turns in all: plans keep threads below that, and refuse what cannot be cut",
            "it unrolls loops of known length and loops over arrays of at most 32 elements, and compiles for \
             seconds: kernels hide their lengths",
        ],
        false => Vec::new(),
    }
}

/// The short form: each power's kernels on two problems that share their variants, few and small ones, as
/// this is somebody's first start. What is found of each power is remembered at once, as the next may end the
/// process.
fn judge(
    gpu: &Gpu,
    verdict: &mut Verdict,
    attempts: &mut Attempts,
    remember: &dyn Fn(&Verdict),
) -> Result<()> {
    let run = |gpu: &Gpu, dtype, problems: [Hard; 2], routes: &[Route]| -> Result<Vec<Check>> {
        let mut checks = Vec::new();
        for hard in problems {
            let prepared = Prepared::new(gpu, hard, [dtype; 2])?;
            for &route in routes {
                checks.push(Check::new(gpu, &prepared, route)?);
                // One is enough, and may have cost the device.
                if checks.last().is_some_and(|check| check.outcome.is_err()) {
                    return Ok(checks);
                }
            }
        }
        Ok(checks)
    };
    let claimed = gpu.caps();
    let small = [Hard::Lengths, Hard::Loud];
    if claimed.subgroups.is_some() && verdict.subgroups == Finding::Unknown {
        let gpu = gpu.narrowed(claimed.without_f16()).untuned();
        verdict.subgroups = attempts.at("subgroups", || {
            let checks = run(&gpu, DType::F32, small, &[Route::Prefill, Route::Decode])?;
            Ok(Verdict::of(&checks).subgroups)
        })?;
        remember(verdict);
        gpu.alive()?;
    }
    if claimed.f16 && verdict.f16 == Finding::Unknown {
        let gpu = gpu.narrowed(verdict.left(claimed)).untuned();
        // What loads and stores it is the same text in every fused kernel.
        verdict.f16 = attempts.at("f16", || {
            let checks = run(&gpu, DType::F16, small, &[Route::ThreePass, Route::Decode])?;
            Ok(Verdict::of(&checks).f16)
        })?;
        remember(verdict);
        gpu.alive()?;
    }
    let left = verdict.left(claimed).with_matrices();
    if left.matrix_form().is_some() && verdict.matrices == Finding::Unknown {
        let gpu = gpu.narrowed(left).untuned();
        verdict.matrices = attempts.at("cooperative matrices", || {
            let problems = [Hard::Wide, Hard::Loud];
            let checks = run(&gpu, DType::F16, problems, &[Route::Prefill])?;
            match Verdict::of(&checks).matrices {
                Finding::Right => product::examine(&gpu),
                wrong => Ok(wrong),
            }
        })?;
        remember(verdict);
    }
    Ok(())
}

/// What is known of the device: remembered, or else found now and remembered.
fn consult(gpu: &Gpu, folder: Option<&Path>) -> Verdict {
    let identity = gpu.identity();
    let remembered = folder.and_then(|folder| Verdict::recall(folder, &identity));
    let mut verdict = remembered.unwrap_or_default();
    if verdict.covers(gpu.caps()) {
        return verdict;
    }
    let started = Instant::now();
    let path = folder.map(|folder| verdict::attempts_path(folder, &identity));
    let mut attempts = Attempts::open(path.as_deref());
    let remember = |verdict: &Verdict| {
        if let Some(folder) = folder {
            verdict.remember(folder, &identity);
        }
    };
    if let Err(error) = judge(gpu, &mut verdict, &mut attempts, &remember) {
        tracing::debug!("the device was not examined to the end: {error}");
    }
    let ms = started.elapsed().as_secs_f64() * 1e3;
    tracing::debug!(ms, ?verdict, "examined");
    verdict
}

/// Where verdicts are kept.
fn folder() -> Option<PathBuf> {
    Some(dirs::cache_dir()?.join("qkv"))
}

/// Verdicts of this process by device, so that without a cache directory too each is examined once.
fn known() -> MutexGuard<'static, BTreeMap<String, Verdict>> {
    static KNOWN: Mutex<BTreeMap<String, Verdict>> = Mutex::new(BTreeMap::new());
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The verdict on a device, of which the file is asked once a process. Threads that ask at once wait for the
/// first.
fn verdict(gpu: &Gpu) -> Verdict {
    let mut known = known();
    let identity = gpu.identity();
    let verdict = known.get(&identity).cloned().unwrap_or_default();
    if verdict.covers(gpu.caps()) {
        return verdict;
    }
    let verdict = consult(gpu, folder().as_deref());
    known.insert(identity, verdict.clone());
    verdict
}

impl Gpu {
    /// The best device of this machine, or the one the environment names (see
    /// [`crate::gpu::DEVICE_VARIABLE`]), as [`Gpu::choose`] opens it.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] where there is none.
    pub fn new() -> Result<Gpu> {
        Gpu::choose(None)
    }

    /// A device by number or by a part of its name, as `qkv devices` lists them; `None` takes the best.
    /// At a device's first use with its driver some of its kernels are [examined](crate::doctor), which takes
    /// a second or so; powers whose kernels were wrong are not used.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] where there is none, or none of that number or name.
    pub fn choose(wanted: Option<&str>) -> Result<Gpu> {
        let mut gpu = Gpu::open(wanted)?;
        let mut found = verdict(&gpu);
        // A wrong kernel may cost the device: the next one does without it, and so on for each power.
        for _ in 0..3 {
            if gpu.alive().is_ok() {
                break;
            }
            gpu = Gpu::open(wanted)?;
            found = verdict(&gpu);
        }
        Ok(found.narrow(&gpu))
    }

    /// The same device without those powers whose kernels give wrong answers on it, for devices of the
    /// caller's: what [`Gpu::choose`] does with its own. Submits and waits, unless the answer is remembered.
    pub fn self_tested(&self) -> Gpu {
        verdict(self).narrow(self)
    }
}

#[cfg(test)]
mod tests;
