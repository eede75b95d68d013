//! What was measured, as it is kept in files.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use qkv::{Error, Result};
use serde::{Deserialize, Serialize};

use super::shape::Shape;

/// Above this share of the median between the quartiles a figure is too noisy to mean anything.
pub const NOISY: f64 = 0.1;

/// The share of a limit above which it was measured too low.
const MOST_SHARE: f64 = 1.05;

/// A run of `qkv bench`.
#[derive(Serialize, Deserialize)]
pub struct Report {
    /// The version of qkv that measured.
    pub qkv: String,
    pub device: Facts,
    pub limits: Limits,
    pub entries: Vec<Entry>,
    /// What was not measured, and why.
    pub refused: Vec<Refused>,
}

#[derive(Serialize, Deserialize, PartialEq)]
pub struct Facts {
    pub name: String,
    pub kind: String,
    pub backend: String,
    pub driver: String,
    /// Smallest and largest subgroup.
    pub subgroups: Option<(u32, u32)>,
    pub f16: bool,
    pub workgroup_memory: u32,
    pub max_binding: u64,
    /// Whether times are by the device's own clock, else by the host's.
    pub timestamps: bool,
}

/// The device's limits, measured before the first shape and after the last one.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct Limits {
    pub f32: Rates,
    pub f16: Option<Rates>,
}

/// The better of both measurements.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct Rates {
    pub gflops: f64,
    pub read_gb_s: f64,
    pub copy_gb_s: f64,
    /// What the other one lacked, as parts of them, in their order; 0 where there was one alone.
    #[serde(default)]
    pub noise: [f64; 3],
}

impl Rates {
    /// The better of both, each rate of its own.
    fn with(&self, other: &Rates) -> Rates {
        let both = |a: f64, b: f64| (a.max(b), 1.0 - a.min(b) / a.max(b));
        let (gflops, multiply_adds) = both(self.gflops, other.gflops);
        let (read_gb_s, reads) = both(self.read_gb_s, other.read_gb_s);
        let (copy_gb_s, copies) = both(self.copy_gb_s, other.copy_gb_s);
        Rates {
            gflops,
            read_gb_s,
            copy_gb_s,
            noise: [multiply_adds, reads, copies],
        }
    }
}

impl Limits {
    /// The better of both.
    pub fn with(&self, other: &Limits) -> Limits {
        let f16 = self.f16.as_ref().zip(other.f16.as_ref());
        Limits {
            f32: self.f32.with(&other.f32),
            f16: f16.map(|(a, b)| a.with(b)),
        }
    }

    fn best(&self, f16: bool, rate: impl Fn(&Rates) -> (f64, f64)) -> (f64, f64) {
        let own = rate(&self.f32);
        let other = self.f16.filter(|_| f16).map(|rates| rate(&rates));
        other.filter(|other| other.0 > own.0).unwrap_or(own)
    }

    /// GB/s of reads, in whatever type they are fastest, and their noise: bytes are bytes.
    pub fn reads(&self) -> (f64, f64) {
        self.best(true, |rates| (rates.read_gb_s, rates.noise[1]))
    }

    /// GFLOP/s that bound a shape, and their noise: what is stored in f16 may be multiplied in f32.
    fn multiply_adds(&self, f16: bool) -> (f64, f64) {
        self.best(f16, |rates| (rates.gflops, rates.noise[0]))
    }

    /// Says what share of its limit an entry reaches, or that the limit is too noisy for that: measured twice it
    /// differs, or the entry is above it.
    pub fn judge(&self, entry: &mut Entry) {
        let (reached, (most, noise)) = match entry.shape.is_decode() {
            true => (entry.gb_s, self.reads()),
            false => (entry.gflops, self.multiply_adds(entry.shape.f16)),
        };
        let share = reached / most;
        entry.limit_noisy = noise > NOISY || share > MOST_SHARE;
        entry.share = (!entry.limit_noisy).then_some(share);
    }
}

/// One shape on one route, or by a peer.
#[derive(Clone, Serialize, Deserialize)]
pub struct Entry {
    pub shape: Shape,
    /// Or the peer.
    pub route: String,
    /// The kernels, and the parts of the key axis; of a peer, what it says of itself.
    pub plan: String,
    /// The kernel and its sizes, as the tuner names them; of a peer, and in reports of old, nothing.
    #[serde(default)]
    pub candidate: String,
    /// Whether a measurement on the device chose it.
    #[serde(default)]
    pub tuned: bool,
    /// Whether the plan takes it of its own accord.
    pub chosen: bool,
    /// Its time over the chosen route's, by the same clock and by runs that followed each other; none where that is
    /// noisy, or the answer wrong.
    pub ratio: Option<f64>,
    /// The first run: planned, compiled, run.
    pub first_ms: f64,
    pub ms: Spread,
    /// The host's time to record, encode and submit one; of routes.
    pub host_ms: Option<f64>,
    pub gflops: f64,
    /// K and V read once.
    pub gb_s: f64,
    /// Of the measured limit: reads where there is one query, by the type that reads fastest; else multiply-adds,
    /// by the better of both types where f16 is stored, as it may be multiplied in f32. None for what does not
    /// run on the device, and where the limit is too noisy.
    pub share: Option<f64>,
    #[serde(default)]
    pub limit_noisy: bool,
    /// The worst error beside the oracle, 1 is allowed; and how many rows were compared.
    pub error: f64,
    pub rows: usize,
    pub times_ms: Vec<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<Peer>,
}

/// What is known of a figure that is not ours.
#[derive(Clone, Serialize, Deserialize)]
pub struct Peer {
    /// `version`, `device` and what else it says.
    pub about: BTreeMap<String, String>,
    /// Whether its times are by the device's own clock; else by the host's, waiting included.
    pub timestamps: bool,
    /// Where it goes by the host's clock, the median of what the chosen route takes by that clock in the same rounds,
    /// which its ratio is to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ours_waited_ms: Option<f64>,
    /// Its largest error and the root mean square of all, as parts of the exact answer's root mean square.
    pub max_error: f64,
    pub rms_error: f64,
    /// Whether the largest error is one that arithmetic in its type explains.
    pub right: bool,
}

impl fmt::Display for Peer {
    /// What it says of itself, and whose clock it goes by.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let rest = self.about.iter().filter(|(name, _)| *name != "version");
        for (_, text) in self.about.get_key_value("version").into_iter().chain(rest) {
            write!(f, "{text}, ")?;
        }
        let clock = if self.timestamps { "device" } else { "host" };
        write!(f, "by the {clock}'s clock")?;
        match self.ours_waited_ms {
            Some(ms) => write!(f, ", ours {ms:.3} ms by that"),
            None => Ok(()),
        }
    }
}

impl Entry {
    /// Whether its time is that of a right answer. A wrong one of ours is never timed.
    pub fn is_right(&self) -> bool {
        self.peer.as_ref().is_none_or(|peer| peer.right)
    }

    /// Whether it ran on the device whose limits were measured.
    pub fn is_on_device(&self) -> bool {
        self.share.is_some() || self.limit_noisy
    }

    /// Whether its figures mean anything.
    pub fn counts(&self) -> bool {
        self.is_right() && !self.ms.is_noisy()
    }
}

#[derive(Serialize, Deserialize)]
pub struct Refused {
    pub shape: Shape,
    /// Or the peer.
    pub route: String,
    pub why: String,
}

/// The middle of some times, and how far they lie apart.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    pub median: f64,
    /// The quartiles.
    pub low: f64,
    pub high: f64,
}

impl Spread {
    pub fn of(times: &[f64]) -> Spread {
        let mut sorted = times.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| match sorted.len() {
            0 => f64::NAN,
            n => {
                let place = share * (n - 1) as f64;
                let (below, above) = (place.floor() as usize, place.ceil() as usize);
                sorted[below] + (sorted[above] - sorted[below]) * place.fract()
            }
        };
        Spread {
            median: at(0.5),
            low: at(0.25),
            high: at(0.75),
        }
    }

    /// What lies between the quartiles, as a share of the median.
    pub fn noise(&self) -> f64 {
        (self.high - self.low) / self.median
    }

    pub fn is_noisy(&self) -> bool {
        self.noise().is_nan() || self.noise() > NOISY
    }
}

/// What takes `own` beside what took `base` ms, by runs that followed each other, so that what slows both down
/// is not in it; none where that is noisy, or the times are.
pub fn ratio(own: &[f64], base: &[f64]) -> Option<f64> {
    let ratios: Vec<f64> = own.iter().zip(base).map(|(a, b)| a / b).collect();
    let ratio = Spread::of(&ratios);
    let is_clear = !ratio.is_noisy() && !Spread::of(own).is_noisy();
    is_clear.then_some(ratio.median)
}

impl Report {
    /// The entries of two runs that are of the same: shape, route and candidate, and who chose it; of what is left,
    /// shape and route, so that a plan that changed is beside what it was. Then how
    /// many are in one run only.
    pub fn pairs<'a>(&'a self, after: &'a Report) -> (Vec<(&'a Entry, &'a Entry)>, usize) {
        let mut left: Vec<&Entry> = after.entries.iter().collect();
        let mut twins = vec![None; self.entries.len()];
        for exactly in [true, false] {
            for (a, twin) in self.entries.iter().zip(&mut twins) {
                let fits = |b: &&Entry| {
                    let same = a.candidate == b.candidate && a.tuned == b.tuned;
                    a.shape == b.shape && a.route == b.route && (same || !exactly)
                };
                if twin.is_none() {
                    let at = left.iter().position(fits);
                    *twin = at.map(|at| left.remove(at));
                }
            }
        }
        let both = self.entries.iter().zip(twins);
        let pairs: Vec<_> = both.filter_map(|(a, b)| b.map(|b| (a, b))).collect();
        let alone = self.entries.len() - pairs.len() + left.len();
        (pairs, alone)
    }

    pub fn load(path: &Path) -> Result<Report> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
        let mut report: Report = serde_json::from_str(&text)
            .map_err(|e| Error::file(path, format_args!("no report of `qkv bench --json`: {e}")))?;
        // Reports of old count a causal shape's work as half of all pairs, and hold the host's clock against the
        // device's.
        for entry in &mut report.entries {
            entry.gflops = entry.shape.flop() / entry.ms.median / 1e6;
            let peer = entry.peer.as_ref();
            if peer.is_some_and(|peer| {
                peer.timestamps != report.device.timestamps && peer.ours_waited_ms.is_none()
            }) {
                entry.ratio = None;
            }
        }
        report.judge();
        Ok(report)
    }

    /// Whether an entry's times are by the device's own clock.
    pub fn is_on_devices_clock(&self, entry: &Entry) -> bool {
        let of_peer = entry.peer.as_ref().map(|peer| peer.timestamps);
        of_peer.unwrap_or(self.device.timestamps)
    }

    /// Every entry's share of the limits as they are known now.
    pub fn judge(&mut self) {
        let entries = self.entries.iter_mut();
        for entry in entries.filter(|entry| entry.is_on_device()) {
            self.limits.judge(entry);
        }
    }

    /// A line an entry, for spreadsheets; one of what was not measured says why, and has no figures.
    pub fn csv(&self) -> String {
        let mut text = String::from(
            "batch,heads,kv_heads,q_len,k_len,dim,causal,type,route,chosen,plan,median_ms,low_ms,high_ms,\
             noisy,gflops,gb_s,share,limit_noisy,ratio,host_ms,first_ms,error,right,why\n",
        );
        let begin = |shape: &Shape, route: &str| {
            let Shape {
                batch,
                heads,
                kv_heads,
                q_len,
                k_len,
                dim,
                causal,
                ..
            } = shape;
            let dtype = shape.dtype().name();
            format!("{batch},{heads},{kv_heads},{q_len},{k_len},{dim},{causal},{dtype},{route}")
        };
        let maybe = |x: Option<f64>| x.map_or(String::new(), |x| x.to_string());
        let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
        for entry in &self.entries {
            let Spread { median, low, high } = entry.ms;
            text += &format!(
                "{},{},{},{median},{low},{high},{},{},{},{},{},{},{},{},{},{},\n",
                begin(&entry.shape, &entry.route),
                entry.chosen,
                quoted(&entry.plan),
                entry.ms.is_noisy(),
                entry.gflops,
                entry.gb_s,
                maybe(entry.share),
                entry.limit_noisy,
                maybe(entry.ratio),
                maybe(entry.host_ms),
                entry.first_ms,
                entry.error,
                entry.is_right(),
            );
        }
        for one in &self.refused {
            let begun = begin(&one.shape, &one.route);
            text += &format!("{begun}{}{}\n", ",".repeat(16), quoted(&one.why));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::{Limits, Rates, Spread, ratio};

    #[test]
    fn quartiles_and_noise() {
        let spread = Spread::of(&[5.0, 1.0, 2.0, 3.0, 4.0]);
        let want = Spread {
            median: 3.0,
            low: 2.0,
            high: 4.0,
        };
        assert_eq!(spread, want);
        assert!(spread.is_noisy());
        assert!(!Spread::of(&[1.0, 1.01, 1.02, 1.0]).is_noisy());
        assert_eq!(Spread::of(&[2.0, 3.0]).median, 2.5);
        assert!(Spread::of(&[]).is_noisy());
    }

    #[test]
    fn limits_are_the_better_of_two_and_say_what_the_other_lacked() {
        let rates = |gflops, read_gb_s| Rates {
            gflops,
            read_gb_s,
            copy_gb_s: 1.0,
            noise: [0.0; 3],
        };
        let limits = |f32, f16| Limits {
            f32,
            f16: Some(f16),
        };
        let before = limits(rates(80.0, 4.0), rates(20.0, 5.0));
        let after = limits(rates(100.0, 4.0), rates(25.0, 4.9));
        let both = before.with(&after);
        assert_eq!((both.f32.gflops, both.f32.read_gb_s), (100.0, 4.0));
        assert!((both.f32.noise[0] - 0.2).abs() < 1e-9 && both.f32.noise[1] == 0.0);
        // In f16 too the multiply-adds of f32, and their noise; reads of the type that reads fastest.
        let [a, b] = [false, true].map(|f16| both.multiply_adds(f16));
        assert_eq!((a.0, a), (100.0, b));
        let (most, noise) = both.reads();
        assert!(most == 5.0 && (noise - 0.02).abs() < 1e-9);
    }

    #[test]
    fn ratios_are_of_one_round() {
        let base = [1.0, 1.0, 1.0, 9.0, 1.0];
        let three = base.map(|ms| 3.0 * ms);
        assert_eq!(ratio(&three, &base), Some(3.0));
        assert_eq!(ratio(&base, &three), Some(1.0 / 3.0));
        assert_eq!(ratio(&three, &[1.0, 2.0, 1.0, 2.0, 2.0]), None);
        assert_eq!(ratio(&[1.0, 2.0, 3.0], &[1.0, 2.0, 3.0]), None);
        assert_eq!(ratio(&three, &[]), None);
    }
}
