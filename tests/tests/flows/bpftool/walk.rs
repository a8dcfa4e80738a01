//! A reader of the page: what it has them enter, what it says about the answers, and what the answers are.

use std::fmt::Debug;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Deserializer, Value, json};

pub const PAGE: &str = include_str!("../../../../docs/bpftool.md");
/// What the page leaves out.
const MORE: &str = "…";

/// The same thing on the page and at the node.
pub type Both<T> = [T; 2];

pub fn text<T: ToString>(both: Both<T>) -> Both<String> {
    both.map(|one| one.to_string())
}

pub fn number(answer: &Both<Value>, pointer: &str) -> Result<Both<u64>> {
    let [page, node] = answer.each_ref().map(|one| one.pointer(pointer)?.as_u64());
    let both = page.zip(node);
    Ok(both
        .with_context(|| format!("no {pointer} in {answer:?}"))?
        .into())
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "most of what is compared is made for it"
)]
pub fn same<T: PartialEq + Debug>(found: T, wanted: T) -> Result<()> {
    ensure!(found == wanted, "{found:?}, not {wanted:?}");
    Ok(())
}

/// With a shell on the node.
pub struct Walk {
    /// What comes before the first command.
    prepared: String,
    /// Each command, and what the page says that it answers.
    asked: Vec<(&'static str, Value)>,
    next: usize,
}

impl Walk {
    pub fn begin(bpffs: &Path) -> Result<Self> {
        let is_command = |line: &&str| line.starts_with("bpftool map ");
        let lines = PAGE.lines().filter_map(|line| line.strip_prefix("    "));
        let lines: Vec<_> = lines.collect();
        let first = lines.iter().position(is_command).context("no command")?;
        let (commands, answers): (Vec<_>, Vec<_>) = lines[first..].iter().copied().partition(is_command);
        let answers = values(&answers.join("\n"))?;
        // None stands elsewhere, and each has its answer.
        let counted = [PAGE.matches("bpftool map").count(), answers.len()];
        same(counted, [commands.len(); 2])?;
        let bpffs = bpffs.display().to_string();
        Ok(Self {
            prepared: lines[..first].join("\n").replace("/sys/fs/bpf", &bpffs),
            asked: commands.into_iter().zip(answers).collect(),
            next: 0,
        })
    }

    /// Whether the page has no other command.
    pub fn end(&self) -> Result<()> {
        same(self.asked.get(self.next), None)
    }

    /// The page's next command, which has to be about this table, and what it answers. Arguments are those of the page's
    /// functions.
    pub fn ask(&mut self, table: &str, arguments: &[Both<String>]) -> Result<Both<Value>> {
        let next = self.asked.get(self.next);
        let (command, page) = next.with_context(|| format!("the page ends before {table}"))?;
        self.next += 1;
        let mut words = command.split_whitespace();
        same(words.find_map(|word| word.strip_prefix("$M/")), Some(table))?;
        let written: Vec<_> = places(command).into_iter().map(|(_, one)| one).collect();
        let [wanted, given] =
            [0, 1].map(|of| arguments.iter().map(|both| both[of].as_str()).collect::<Vec<_>>());
        same(written, wanted).context(*command)?;
        let node = self.again(&given)?;
        if let Some(field) = unlike(page, &node) {
            bail!("{field} is not as on the page: {command}: {node}");
        }
        Ok([page.clone(), node])
    }

    /// The last command with other arguments.
    pub fn again(&self, arguments: &[&str]) -> Result<Value> {
        let text = succeeded(&self.last(arguments)?)?;
        let mut values = values(&text)?;
        values
            .pop()
            .with_context(|| format!("{arguments:?} has no answer"))
    }

    pub fn finds_nothing(&self, arguments: &[&str]) -> Result<()> {
        let output = self.last(arguments)?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(text.contains("Not found"), "{arguments:?}: {text}");
        Ok(())
    }

    fn last(&self, arguments: &[&str]) -> Result<Output> {
        let (page, _) = self.asked[self.next - 1];
        let mut command = page.to_owned();
        for ((place, written), argument) in places(page).into_iter().zip(arguments).rev() {
            command.replace_range(place..place + written.len(), argument);
        }
        self.bash(&command)
    }

    pub fn quad(&self, answer: &Value, pointer: &str) -> Result<String> {
        let addr_be = answer.pointer(pointer).context("no address")?;
        self.shell(&format!("quad {addr_be}"))
    }

    pub fn shell(&self, command: &str) -> Result<String> {
        Ok(succeeded(&self.bash(command)?)?.trim().to_owned())
    }

    fn bash(&self, command: &str) -> Result<Output> {
        let script = format!("set -eu\n{{\n{}\n}} >&2\n{command}", self.prepared);
        let output = Command::new("bash").args(["-c", &script]).output();
        output.context("failed to run bash")
    }

    /// What the page computes in passing: a `quad` in backticks, and what it is.
    pub fn sums(&self) -> Result<()> {
        let pieces: Vec<_> = PAGE.split('`').collect();
        let mut checked = 0;
        for (place, code) in pieces.iter().enumerate() {
            if ["quad ", "port ", "printf "]
                .iter()
                .any(|name| code.starts_with(name))
            {
                let said = pieces[place + 1..].concat();
                let said = said.strip_prefix(" is ").or(said.strip_prefix(" prints "));
                let said = said.and_then(|said| said.split_whitespace().next());
                let said = said.map(|said| said.trim_end_matches(['.', ',']));
                same(Some(self.shell(code)?.as_str()), said).with_context(|| (*code).to_owned())?;
                checked += 1;
            }
        }
        same(checked, 5)
    }
}

fn succeeded(output: &Output) -> Result<String> {
    let [text, error] = [&output.stdout, &output.stderr].map(|pipe| String::from_utf8_lossy(pipe));
    ensure!(output.status.success(), "{}: {text}{error}", output.status);
    Ok(text.into_owned())
}

/// What the page's functions are given in a command, and where it stands: of `$(n $((777 - 1)))`, 777.
fn places(command: &str) -> Vec<(usize, &str)> {
    let calls = ["$(n ", "$(a ", "$(p "];
    let mut found = Vec::new();
    for (place, call) in calls.iter().flat_map(|call| command.match_indices(call)) {
        let rest = command[place + call.len()..].trim_start_matches(['$', '(']);
        let end = rest.find(|letter| !matches!(letter, '0'..='9' | '.'));
        found.push((command.len() - rest.len(), &rest[..end.unwrap_or(rest.len())]));
    }
    found.sort_unstable();
    found
}

/// Answers, one after the other. A variable has no type for bpftool: its bytes are a number, the lowest first.
fn values(text: &str) -> Result<Vec<Value>> {
    let number = |bytes: &str| {
        let bytes: String = bytes.split_whitespace().rev().collect();
        u64::from_str_radix(&bytes, 16)
    };
    let mut all = String::new();
    for line in text.lines().filter(|line| !line.starts_with("Found ")) {
        let bytes = line
            .strip_prefix("key: ")
            .and_then(|rest| rest.split_once("value: "));
        all += &match bytes {
            Some((key, value)) => json!({"key": number(key)?, "value": number(value)?}).to_string(),
            None => line.replace(": …", ": null").replace(", …", ", \"…\": null"),
        };
    }
    let values = Deserializer::from_str(&all).into_iter().collect::<Result<_, _>>();
    values.with_context(|| format!("no answers: {all}"))
}

/// The field in which an answer is not like the page's: it is missing there, or not shown here, or of another kind. Of lists
/// the first elements are compared, for machines have more CPUs or fewer.
fn unlike(page: &Value, node: &Value) -> Option<String> {
    match (page, node) {
        (Value::Null, _) | (Value::Number(_), Value::Number(_)) => None,
        (Value::Object(page), Value::Object(node)) => {
            let is_shown = |name: &&String| page.contains_key(MORE) || page.contains_key(*name);
            let mut shown = page.iter().filter(|(name, _)| *name != MORE);
            let differs = |(name, one): (&String, &Value)| match node.get(name) {
                Some(other) => unlike(one, other).map(|field| format!("{name}/{field}")),
                None => Some(name.clone()),
            };
            let extra = node.keys().find(|name| !is_shown(name));
            extra.cloned().or_else(|| shown.find_map(differs))
        }
        (Value::Array(page), Value::Array(node)) => {
            unlike(page.first()?, node.first().unwrap_or(&Value::Bool(false)))
        }
        _ => Some(node.to_string()),
    }
}
