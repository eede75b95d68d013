//! What was measured, as it is kept in files.

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

/// One shape on one route.
#[derive(Clone, Serialize, Deserialize)]
pub struct Entry {
    pub shape: Shape,
    pub route: String,
    /// The kernels, and the parts of the key axis.
    pub plan: String,
    /// Whether the plan takes this route of its own accord.
    pub chosen: bool,
    /// Its time over the chosen route's, by runs that followed each other; none where that is noisy.
    pub ratio: Option<f64>,
    /// The first run: planned, compiled, run.
    pub first_ms: f64,
    pub ms: Spread,
    /// The host's time to record, encode and submit one.
    pub host_ms: f64,
    pub gflops: f64,
    /// K and V read once.
    pub gb_s: f64,
    /// Of the measured limit: reads where there is one query, else multiply-adds; the better of both types
    /// where f16 is stored, as it may be multiplied in f32.
    pub share: f64,
    /// The worst error beside the oracle, 1 is allowed; and how many rows were compared.
    pub error: f64,
    pub rows: usize,
    pub times_ms: Vec<f64>,
}

#[derive(Serialize, Deserialize)]
pub struct Refused {
    pub shape: Shape,
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

impl Report {
    pub fn load(path: &Path) -> Result<Report> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
        serde_json::from_str(&text)
            .map_err(|e| Error::file(path, format_args!("no report of `qkv bench --json`: {e}")))
    }

    /// A line an entry, for spreadsheets.
    pub fn csv(&self) -> String {
        let mut text = String::from(
            "batch,heads,kv_heads,q_len,k_len,dim,causal,type,route,chosen,plan,median_ms,low_ms,high_ms,\
             noisy,gflops,gb_s,share,host_ms,first_ms,error\n",
        );
        for entry in &self.entries {
            let Shape {
                batch,
                heads,
                kv_heads,
                q_len,
                k_len,
                dim,
                causal,
                ..
            } = entry.shape;
            let Spread { median, low, high } = entry.ms;
            text += &format!(
                "{batch},{heads},{kv_heads},{q_len},{k_len},{dim},{causal},{},{},{},\"{}\",{median},{low},{high},\
                 {},{},{},{},{},{},{}\n",
                entry.shape.dtype().name(),
                entry.route,
                entry.chosen,
                entry.plan,
                entry.ms.is_noisy(),
                entry.gflops,
                entry.gb_s,
                entry.share,
                entry.host_ms,
                entry.first_ms,
                entry.error,
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::Spread;

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
}
