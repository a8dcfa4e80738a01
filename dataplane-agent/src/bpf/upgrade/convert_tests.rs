//! The conversion of arbitrary layouts, against a reader that takes both apart into named numbers.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn number(size: u32) -> Type {
    Type::Number { size, signed: false }
}

/// A struct of these fields, one behind the other.
fn record(fields: impl IntoIterator<Item = (String, Type)>) -> Type {
    let mut size = 0;
    let place = |(name, of): (String, Type)| {
        let at = size;
        size += of.size();
        Field { name, at, of }
    };
    let fields = fields.into_iter().map(place).collect();
    Type::Struct { size, fields }
}

fn named(fields: &[(&str, Type)]) -> Type {
    record(fields.iter().map(|(name, of)| ((*name).to_owned(), of.clone())))
}

/// Every number by its path, as bytes without those at the end that are zero.
fn leaves(of: &Type, bytes: &[u8], path: &str, into: &mut BTreeMap<String, Vec<u8>>) {
    match of {
        Type::Number { size, .. } | Type::Bytes { size } => {
            let mut value = bytes[..*size as usize].to_vec();
            while value.last() == Some(&0) {
                value.pop();
            }
            into.insert(path.to_owned(), value);
        }
        Type::Array { of, len } => {
            let size = of.size() as usize;
            for place in 0..*len as usize {
                leaves(of, &bytes[place * size..], &format!("{path}[{place}]"), into);
            }
        }
        Type::Struct { fields, .. } => {
            for field in fields {
                leaves(
                    &field.of,
                    &bytes[field.at as usize..],
                    &format!("{path}.{}", field.name),
                    into,
                );
            }
        }
    }
}

fn read(of: &Type, bytes: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut into = BTreeMap::new();
    leaves(of, bytes, "", &mut into);
    into
}

/// Types of the same kind for the same name: the name tells which.
fn arbitrary(kind: u8, depth: u32) -> BoxedStrategy<Type> {
    let numbers = prop::sample::select(vec![1, 2, 4, 8]).prop_map(number);
    let array = |(of, len)| Type::Array {
        of: Box::new(of),
        len,
    };
    match kind {
        0 => numbers.boxed(),
        1 => (numbers, 0..5_u32).prop_map(array).boxed(),
        _ if depth == 0 => Just(named(&[("n0", number(4))])).boxed(),
        2 => records(depth - 1),
        _ => (records(depth - 1), 0..3_u32).prop_map(array).boxed(),
    }
}

/// Some fields of a few names in any order.
fn records(depth: u32) -> BoxedStrategy<Type> {
    let field = move |place: u8| arbitrary(place % 4, depth).prop_map(move |of| (format!("n{place}"), of));
    let all: Vec<_> = (0..8_u8).map(field).collect();
    all.prop_flat_map(|all| prop::sample::subsequence(all, 0..=8))
        .prop_shuffle()
        .prop_map(record)
        .boxed()
}

fn two_with_bytes() -> impl Strategy<Value = (Type, Type, Vec<u8>)> {
    // Small numbers in large fields are as likely as large ones.
    let byte = prop_oneof![3 => Just(0_u8), 1 => any::<u8>()];
    (records(2), records(2)).prop_flat_map(move |(old, new)| {
        let bytes = prop::collection::vec(byte.clone(), old.size() as usize);
        (Just(old), Just(new), bytes)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn what_has_a_name_in_both_is_equal_and_all_else_is_zero((old, new, bytes) in two_with_bytes()) {
        let plan = Plan::new(&old, &new, Part::Value).unwrap();
        let before = read(&old, &bytes);
        if let Some(converted) = plan.convert(&bytes) {
            prop_assert_eq!(converted.len(), new.size() as usize);
            for (path, value) in read(&new, &converted) {
                let expected = before.get(&path).cloned().unwrap_or_default();
                prop_assert_eq!(value, expected, "{}", path);
            }
        } else {
            // There is a number, or an element of an array, for which there is no room.
            let room = read(&new, &vec![0xff; new.size() as usize]);
            let is_lost = |(path, value): (&String, &Vec<u8>)| match room.get(path) {
                Some(all) => value.len() > all.len(),
                None => !value.is_empty() && path.contains('['),
            };
            prop_assert!(before.iter().any(is_lost));
        }
    }

    #[test]
    fn keys_that_differ_stay_different((old, new, bytes) in two_with_bytes(), at in any::<prop::sample::Index>(), other: u8) {
        let plan = Plan::new(&old, &new, Part::Key).unwrap();
        let mut second = bytes.clone();
        if !second.is_empty() {
            let at = at.index(second.len());
            second[at] = other;
        }
        if let (Some(one), Some(two)) = (plan.convert(&bytes), plan.convert(&second)) {
            prop_assert_eq!(one == two, bytes == second);
        }
    }

    #[test]
    fn there_and_back_is_the_same((old, new, bytes) in two_with_bytes()) {
        let there = Plan::new(&old, &new, Part::Key).unwrap();
        let back = Plan::new(&new, &old, Part::Key).unwrap();
        if let Some(converted) = there.convert(&bytes) {
            prop_assert_eq!(back.convert(&converted), Some(bytes));
        }
    }

    #[test]
    fn a_layout_converts_to_itself_as_it_is((of, _, bytes) in two_with_bytes()) {
        let plan = Plan::new(&of, &of, Part::Key).unwrap();
        prop_assert!(plan.steps.len() <= 1, "{:?}", plan);
        prop_assert_eq!(plan.convert(&bytes), Some(bytes));
    }
}

#[test]
fn numbers_grow_and_shrink_as_far_as_they_fit() {
    let (small, large) = (named(&[("n", number(2))]), named(&[("n", number(4))]));
    let grow = Plan::new(&small, &large, Part::Value).unwrap();
    let shrink = Plan::new(&large, &small, Part::Value).unwrap();
    assert_eq!(grow.convert(&[1, 0xff]), Some(vec![1, 0xff, 0, 0]));
    assert_eq!(shrink.convert(&[1, 0xff, 0, 0]), Some(vec![1, 0xff]));
    assert_eq!(shrink.convert(&[1, 0xff, 1, 0]), None);
    assert_eq!(grow.convert(&[1]), None);

    let of = |size| named(&[("n", Type::Number { size, signed: true })]);
    let grow = Plan::new(&of(2), &of(4), Part::Value).unwrap();
    let shrink = Plan::new(&of(4), &of(2), Part::Value).unwrap();
    assert_eq!(grow.convert(&[0xfe, 0xff]), Some(vec![0xfe, 0xff, 0xff, 0xff]));
    assert_eq!(shrink.convert(&[0xfe, 0xff, 0xff, 0xff]), Some(vec![0xfe, 0xff]));
    assert_eq!(shrink.convert(&[0xfe, 0x7f, 0xff, 0xff]), None);
}

#[test]
fn what_became_something_else_is_named() {
    let inside = |of| named(&[("meta", named(&[("backend", of)]))]);
    let array = Type::Array {
        of: Box::new(number(4)),
        len: 4,
    };
    let misfit = Plan::new(&inside(number(4)), &inside(array), Part::Value).unwrap_err();
    assert_eq!(
        misfit.to_string(),
        "value.meta.backend is an array and was a number of 4 bytes"
    );
    // In network byte order it would have to grow at its beginning.
    let port = |size| named(&[("port_be", number(size))]);
    let misfit = Plan::new(&port(2), &port(4), Part::Key).unwrap_err();
    assert_eq!(
        misfit.to_string(),
        "key.port_be is a number of 4 bytes and was a number of 2 bytes"
    );
}

#[test]
fn a_key_that_loses_a_field_loses_entries_that_used_it() {
    let old = named(&[("addr", number(4)), ("zone", number(4))]);
    let new = named(&[("addr", number(4))]);
    let plan = Plan::new(&old, &new, Part::Key).unwrap();
    assert_eq!(plan.convert(&[1, 2, 3, 4, 0, 0, 0, 0]), Some(vec![1, 2, 3, 4]));
    assert_eq!(plan.convert(&[1, 2, 3, 4, 1, 0, 0, 0]), None);
    let plan = Plan::new(&old, &new, Part::Value).unwrap();
    assert_eq!(plan.convert(&[1, 2, 3, 4, 1, 0, 0, 0]), Some(vec![1, 2, 3, 4]));
}
