//! What was measured, as it is kept in files.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use qkv::{Error, Result};
use serde::{Deserialize, Serialize};

use super::shape::Shape;

/// Above this share of the median between the quartiles a figure is too noisy to mean anything.
pub const NOISY: f64 = 0.1;

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

/// The device's measured limits.
#[derive(Serialize, Deserialize)]
pub struct Limits {
    pub f32: Rates,
    pub f16: Option<Rates>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct Rates {
    pub gflops: f64,
    pub read_gb_s: f64,
    pub copy_gb_s: f64,
}

/// One shape on one route, or by a peer.
#[derive(Clone, Serialize, Deserialize)]
pub struct Entry {
    pub shape: Shape,
    /// Or the peer.
    pub route: String,
    /// The kernels, and the parts of the key axis; of a peer, what it says of itself.
    pub plan: String,
    /// Whether the plan takes this route of its own accord.
    pub chosen: bool,
    /// Its time over the chosen route's, by runs that followed each other; none where that is noisy, or the
    /// answer wrong.
    pub ratio: Option<f64>,
    /// The first run: planned, compiled, run.
    pub first_ms: f64,
    pub ms: Spread,
    /// The host's time to record, encode and submit one; of routes.
    pub host_ms: Option<f64>,
    pub gflops: f64,
    /// K and V read once.
    pub gb_s: f64,
    /// Of the measured limit: reads where there is one query, else multiply-adds; the better of both types
    /// where f16 is stored, as it may be multiplied in f32. None for what does not run on the device.
    pub share: Option<f64>,
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
        write!(f, "by the {clock}'s clock")
    }
}

impl Entry {
    /// Whether its time is that of a right answer. A wrong one of ours is never timed.
    pub fn is_right(&self) -> bool {
        self.peer.as_ref().is_none_or(|peer| peer.right)
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
    pub fn load(path: &Path) -> Result<Report> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
        serde_json::from_str(&text)
            .map_err(|e| Error::file(path, format_args!("no report of `qkv bench --json`: {e}")))
    }

    /// A line an entry, for spreadsheets; one of what was not measured says why, and has no figures.
    pub fn csv(&self) -> String {
        let mut text = String::from(
            "batch,heads,kv_heads,q_len,k_len,dim,causal,type,route,chosen,plan,median_ms,low_ms,high_ms,\
             noisy,gflops,gb_s,share,ratio,host_ms,first_ms,error,right,why\n",
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
                "{},{},{},{median},{low},{high},{},{},{},{},{},{},{},{},{},\n",
                begin(&entry.shape, &entry.route),
                entry.chosen,
                quoted(&entry.plan),
                entry.ms.is_noisy(),
                entry.gflops,
                entry.gb_s,
                maybe(entry.share),
                maybe(entry.ratio),
                maybe(entry.host_ms),
                entry.first_ms,
                entry.error,
                entry.is_right(),
            );
        }
        for one in &self.refused {
            let begun = begin(&one.shape, &one.route);
            text += &format!("{begun}{}{}\n", ",".repeat(15), quoted(&one.why));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::{Spread, ratio};

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
