//! What rounds say: medians, and whether one thing takes longer than another.
//!
//! Noise is judged twice. A ratio is the median over rounds, and the 95 % confidence interval of that median (by order
//! statistics, so without assuming a distribution) has to lie above the limit as a whole. And since the kernel tells whole
//! nanoseconds only, a difference of less than one says nothing.

use serde::Serialize;

/// What the kernel's answers can't tell from nothing, ns.
const RESOLUTION: f64 = 1.0;

/// One thing beside another.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// Medians, ns.
    pub base: f64,
    pub ours: f64,
    /// The median of the rounds' ratios.
    pub ratio: f64,
    /// Its confidence interval.
    pub between: (f64, f64),
    /// The ratio that is allowed.
    pub limit: f64,
    /// Noise does not explain that it is above.
    pub is_over: bool,
}

impl Comparison {
    /// From ns a packet, one element a round. `None` without rounds.
    pub fn of(base: &[f64], ours: &[f64], limit: f64) -> Option<Self> {
        let pairs = ours.iter().zip(base);
        let ratios: Vec<f64> = pairs.map(|(ours, base)| ours / base.max(1.0)).collect();
        let between = interval(&ratios)?;
        Some(Self {
            base: median(base),
            ours: median(ours),
            ratio: median(&ratios),
            between,
            limit,
            is_over: between.0 > limit && median(&less(ours, base)) > RESOLUTION,
        })
    }
}

/// Each element less another.
pub fn less(of: &[f64], other: &[f64]) -> Vec<f64> {
    of.iter().zip(other).map(|(a, b)| a - b).collect()
}

pub fn median(of: &[f64]) -> f64 {
    let mut sorted = of.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The 95 % confidence interval of the median: as many of the smallest and of the largest are left out as a fair coin
/// would leave out in less than 2.5 % of all cases each. With fewer than six it is all there is.
fn interval(of: &[f64]) -> Option<(f64, f64)> {
    let mut sorted = of.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rounds = u16::try_from(of.len()).ok()?;
    let (mut left_out, mut tail, mut ways) = (0, 0.0, 0.5f64.powi(rounds.into()));
    loop {
        tail += ways;
        if tail > 0.025 {
            break;
        }
        ways *= f64::from(rounds - left_out) / f64::from(left_out + 1);
        left_out += 1;
    }
    let first = usize::from(left_out.saturating_sub(1));
    Some((*sorted.get(first)?, *sorted.get(sorted.len() - 1 - first)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_leave_out_what_a_coin_would() {
        let values = |count: u32| (0..count).map(f64::from).collect::<Vec<_>>();
        // Tables of the sign test, two-sided, 5 %.
        for (count, first) in [(5, 0.0), (6, 0.0), (9, 1.0), (15, 3.0), (31, 9.0)] {
            let last = f64::from(count - 1) - first;
            assert_eq!(interval(&values(count)), Some((first, last)), "{count} rounds");
        }
        assert_eq!(interval(&[]), None);
    }

    #[test]
    fn over_is_what_noise_does_not_explain() {
        let old: Vec<f64> = (0..15).map(|round| 100.0 + f64::from(round % 5)).collect();
        let scaled = |by: f64| old.iter().map(|ns| ns * by).collect::<Vec<_>>();
        let over = |base: &[f64], ours: &[f64]| Comparison::of(base, ours, 1.05).unwrap().is_over;
        let slower = |ours: &[f64]| over(&old, ours);
        assert!(!slower(&old));
        assert!(!slower(&scaled(1.04)));
        assert!(slower(&scaled(1.06)));
        // Five rounds in which the machine was busy.
        let mut busy = scaled(1.0);
        busy[..5].iter_mut().for_each(|ns| *ns *= 2.0);
        assert!(!slower(&busy));
        // Less than the kernel's clock can tell.
        let few = vec![4.0; 15];
        assert!(!over(&few, &[4.9; 15]));
        assert!(over(&few, &[5.1; 15]));
    }
}
