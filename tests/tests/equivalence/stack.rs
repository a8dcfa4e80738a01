//! What the verifier counts of stacks, on the kernel that counts most: a program and the functions that it calls have 512 bytes
//! along any chain of calls, and each takes its own rounded up to 32 (`check_max_stack_depth` before Linux 6.8).

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::{Context, Result, ensure};
use object::read::elf::ElfFile64;
use object::{Object, ObjectSection, ObjectSymbol, RelocationTarget, SectionKind, SymbolKind};

const STACK: usize = 512;
const GRAIN: usize = 32;
const INSTRUCTION: u16 = 8;

/// Where a function begins: a section of the object, and an offset there.
type Place = (usize, u64);

/// A function of the object.
#[derive(Debug, Default)]
struct Function {
    name: String,
    /// Bytes of its own stack.
    stack: usize,
    calls: BTreeSet<Place>,
}

#[test]
fn no_chain_of_calls_takes_more_stack_than_a_program_has() -> Result<()> {
    let path = super::object();
    let Ok(bytes) = std::fs::read(&path) else {
        println!("skipped: no {}: run `cargo xtask build-ebpf`", path.display());
        return Ok(());
    };
    let functions = functions(&bytes)?;
    ensure!(
        functions.len() > 20,
        "the object has {} functions",
        functions.len()
    );
    let mut deepest = HashMap::new();
    for place in functions.keys() {
        let (depth, chain) = depth(&functions, *place, &mut deepest)?;
        ensure!(depth <= STACK, "{depth} bytes along {}", chain.join(" → "));
    }
    Ok(())
}

/// The functions of an object by their places.
fn functions(bytes: &[u8]) -> Result<BTreeMap<Place, Function>> {
    let file = ElfFile64::<object::LittleEndian>::parse(bytes).context("failed to read the object")?;
    let mut functions = BTreeMap::new();
    for symbol in file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text) {
        let Some(index) = symbol.section_index() else {
            continue;
        };
        let section = file.section_by_index(index)?;
        if section.kind() != SectionKind::Text || symbol.size() == 0 {
            continue;
        }
        // A call of another section's function, or of one in `.text`, names a symbol: a section's, with the place in the
        // instruction, or the function's own.
        let targets: HashMap<u64, (Place, bool)> = section
            .relocations()
            .filter_map(|(offset, relocation)| {
                let RelocationTarget::Symbol(target) = relocation.target() else {
                    return None;
                };
                let target = file.symbol_by_index(target).ok()?;
                let place = (target.section_index()?.0, target.address());
                Some((offset, (place, target.kind() == SymbolKind::Section)))
            })
            .collect();
        let code = section
            .data_range(symbol.address(), symbol.size())?
            .with_context(|| {
                format!(
                    "{} reaches beyond its section",
                    symbol.name().unwrap_or("a function")
                )
            })?;
        let mut function = Function {
            name: symbol.name().unwrap_or_default().to_owned(),
            ..Function::default()
        };
        // Registers that hold the frame's end, for the addresses that are made of it.
        let mut frames = [false; 16];
        for (number, instruction) in code.chunks_exact(INSTRUCTION.into()).enumerate() {
            let at = symbol.address() + number as u64 * u64::from(INSTRUCTION);
            let (opcode, registers) = (instruction[0], instruction[1]);
            let (to, from) = (usize::from(registers & 15), usize::from(registers >> 4));
            let offset = i16::from_le_bytes([instruction[2], instruction[3]]);
            let immediate = i32::from_le_bytes(instruction[4..8].try_into()?);
            let mut reaches = |offset: i32| {
                function.stack = function.stack.max(usize::try_from(-offset).unwrap_or(0));
            };
            match (opcode, opcode & 7) {
                // A call of a function of ours.
                (0x85, _) if from == 1 => {
                    let next = at + u64::from(INSTRUCTION);
                    let distance = i64::from(immediate) * i64::from(INSTRUCTION);
                    let inside = distance + i64::from(INSTRUCTION);
                    function.calls.insert(match targets.get(&at) {
                        Some(((section, _), true)) => (*section, inside.cast_unsigned()),
                        Some((place, false)) => *place,
                        None => (index.0, next.wrapping_add_signed(distance)),
                    });
                }
                // r = r10, r += immediate
                (0xbf, _) if from == 10 => frames[to] = true,
                (0x07, _) if frames[to] => {
                    reaches(immediate);
                    frames[to] = false;
                }
                // Loads and stores.
                (_, 1) => {
                    if from == 10 {
                        reaches(i32::from(offset));
                    }
                    frames[to] = false;
                }
                (_, 2 | 3) if to == 10 => reaches(i32::from(offset)),
                (_, 2 | 3 | 5 | 6) => {}
                _ => frames[to] = false,
            }
        }
        functions.insert((index.0, symbol.address()), function);
    }
    Ok(functions)
}

/// The most that a function and what it calls take, and along which chain.
fn depth(
    functions: &BTreeMap<Place, Function>,
    place: Place,
    known: &mut HashMap<Place, (usize, Vec<String>)>,
) -> Result<(usize, Vec<String>)> {
    if let Some(known) = known.get(&place) {
        return Ok(known.clone());
    }
    let function = functions
        .get(&place)
        .with_context(|| format!("a call of {place:?}, where no function is"))?;
    let mut below = (0, Vec::new());
    for call in &function.calls {
        let depth = depth(functions, *call, known)?;
        if depth.0 > below.0 {
            below = depth;
        }
    }
    let own = function.stack.max(1).next_multiple_of(GRAIN);
    let mut chain = vec![format!("{} ({})", function.name, function.stack)];
    chain.extend(below.1);
    let depth = (own + below.0, chain);
    known.insert(place, depth.clone());
    Ok(depth)
}
