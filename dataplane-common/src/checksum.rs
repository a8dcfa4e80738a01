//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
//!
//! Differences are one's complement sums of the complemented old and the new words, as `bpf_csum_diff` returns them,
//! in whatever byte order the words were loaded: the sum does not care as long as it is the same everywhere.

/// Adds two 32-bit partial sums with end-around carry.
#[inline(always)]
#[must_use]
pub fn add(a: u32, b: u32) -> u32 {
    let sum = u64::from(a) + u64::from(b);
    (sum as u32) + (sum >> 32) as u32
}

/// The difference made by replacing `old` by `new`.
#[inline(always)]
#[must_use]
pub fn diff(old: u32, new: u32) -> u32 {
    add(!old, new)
}

/// As [`diff`], for 16-bit words.
#[inline(always)]
#[must_use]
pub fn diff16(old: u16, new: u16) -> u32 {
    u32::from(!old) + u32::from(new)
}

/// The difference made by replacing every word of `old` by the word of `new` at its place.
#[inline(always)]
#[must_use]
pub fn diff_words(old: &[u32], new: &[u32]) -> u32 {
    let mut sum = 0;
    let mut i = 0;
    while i < old.len() && i < new.len() {
        sum = add(sum, diff(old[i], new[i]));
        i += 1;
    }
    sum
}

/// Folds a 32-bit partial sum to 16 bits.
#[inline(always)]
#[must_use]
pub fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// A checksum field after a change: `HC' = ~(~HC + diff)` (RFC 1624, equation 3).
#[inline(always)]
#[must_use]
pub fn update(field: u16, diff: u32) -> u16 {
    !fold(add(u32::from(!field), diff))
}

/// The sum of the 16-bit words of `bytes`, as loaded from memory; an odd last byte counts as if followed by zero.
#[must_use]
pub fn sum(bytes: &[u8]) -> u32 {
    let mut chunks = bytes.chunks_exact(2);
    let mut total = 0;
    for pair in &mut chunks {
        total = add(total, u32::from(u16::from_ne_bytes([pair[0], pair[1]])));
    }
    if let [last] = chunks.remainder() {
        total = add(total, u32::from(u16::from_ne_bytes([*last, 0])));
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn incremental_equals_from_scratch() {
        let mut bytes = [
            0x45, 0x00, 0x00, 0x73, 0x40, 0x00, 0x40, 0x11, 0xc0, 0xa8, 0x00, 0x01,
        ];
        let before = !fold(sum(&bytes));
        let old = u32::from_ne_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        let new = u32::from_ne_bytes([10, 244, 1, 21]);
        bytes[8..12].copy_from_slice(&new.to_ne_bytes());
        assert_eq!(update(before, diff(old, new)), !fold(sum(&bytes)));
    }

    #[test]
    fn rfc_1624_corner_case_does_not_produce_minus_zero() {
        // RFC 1624, section 4: HC = 0xdd2f, m = 0x5555, m' = 0x3285 gives 0x0000.
        assert_eq!(update(0xdd2f, diff16(0x5555, 0x3285)), 0x0000);
    }
}
