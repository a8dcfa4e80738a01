//! Numbers as they are read at a glance: three digits, and `k`, `M`, `G` or `T`.

/// A rate; one that is not known is a dash.
pub fn rate(value: Option<f64>) -> String {
    let Some(mut value) = value else {
        return "-".to_owned();
    };
    let mut unit = "";
    for larger in ["k", "M", "G", "T"] {
        if value < 999.5 {
            break;
        }
        value /= 1000.0;
        unit = larger;
    }
    if value == 0.0 || value >= 99.95 || (unit.is_empty() && value >= 9.95) {
        format!("{value:.0}{unit}")
    } else {
        format!("{value:.1}{unit}")
    }
}

/// A count.
pub fn size(count: u64) -> String {
    if count < 1000 {
        return count.to_string();
    }
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    rate(Some(count as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_are_enough() {
        for (value, text) in [
            (0.0, "0"),
            (0.04, "0.0"),
            (0.34, "0.3"),
            (9.9, "9.9"),
            (12.3, "12"),
            (999.0, "999"),
            (999.6, "1.0k"),
            (1234.0, "1.2k"),
            (45_600.0, "45.6k"),
            (456_000.0, "456k"),
            (33_000_000.0, "33.0M"),
            (5e15, "5000T"),
        ] {
            assert_eq!(rate(Some(value)), text, "{value}");
        }
        assert_eq!(rate(None), "-");
        assert_eq!((size(2), size(999)), ("2".to_owned(), "999".to_owned()));
        assert_eq!(size(1500), "1.5k");
    }
}
