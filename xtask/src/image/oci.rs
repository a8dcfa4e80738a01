//! An OCI image layout in one tar: `oci-layout`, `index.json`, and blobs by their digests. Three small JSON documents, after
//! version 1.1 of the image specification; times, owners and order are fixed.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;

use anyhow::{Context, Result};
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// What an image is made of.
#[derive(Debug)]
pub struct Image<'a> {
    /// By the specification's names: `amd64`.
    pub architecture: &'a str,
    /// Name and tag, by which a runtime finds the image after an import.
    pub reference: String,
    pub tag: &'a str,
    pub entrypoint: Vec<&'a str>,
    pub labels: BTreeMap<String, String>,
    /// The time of everything in it, in seconds since 1970.
    pub seconds: u64,
    /// By path, without a slash in front.
    pub files: BTreeMap<String, File>,
}

/// A file of the image; all belong to root.
#[derive(Debug)]
pub struct File {
    pub content: Vec<u8>,
    mode: u32,
}

impl File {
    pub fn program(content: Vec<u8>) -> Self {
        Self { content, mode: 0o755 }
    }

    pub fn text(content: Vec<u8>) -> Self {
        Self { content, mode: 0o644 }
    }
}

/// The archive, and the digest of its manifest, by which registries name the image.
#[derive(Debug)]
pub struct Archive {
    pub bytes: Vec<u8>,
    pub digest: String,
}

/// Packs an image.
pub fn archive(image: &Image<'_>) -> Result<Archive> {
    let created = rfc3339(image.seconds);
    let layer = layer(image).context("failed to pack the layer")?;
    let packed = compress(&layer).context("failed to compress the layer")?;
    let config = json!({
        "architecture": image.architecture,
        "os": "linux",
        "created": created,
        "config": {
            "Entrypoint": image.entrypoint,
            "WorkingDir": "/",
            "Labels": image.labels,
        },
        "rootfs": { "type": "layers", "diff_ids": [digest(&layer)] },
        "history": [{ "created": created, "created_by": "cargo xtask image" }],
    })
    .to_string()
    .into_bytes();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": descriptor(CONFIG, &config),
        "layers": [descriptor(LAYER, &packed)],
        "annotations": image.labels,
    })
    .to_string()
    .into_bytes();
    let mut named = descriptor(MANIFEST, &manifest);
    named["platform"] = json!({ "architecture": image.architecture, "os": "linux" });
    named["annotations"] = json!({
        "io.containerd.image.name": image.reference,
        "org.opencontainers.image.ref.name": image.tag,
    });
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [named] });
    let mut entries = BTreeMap::from([
        (
            "oci-layout".to_owned(),
            json!({ "imageLayoutVersion": "1.0.0" }).to_string().into_bytes(),
        ),
        ("index.json".to_owned(), index.to_string().into_bytes()),
    ]);
    let digest_of_manifest = digest(&manifest);
    for blob in [packed, config, manifest] {
        entries.insert(digest(&blob).replace("sha256:", "blobs/sha256/"), blob);
    }
    let entries = entries
        .iter()
        .map(|(path, content)| (path.as_str(), content.as_slice(), 0o644));
    Ok(Archive {
        bytes: tar_of(entries, image.seconds).context("failed to pack the archive")?,
        digest: digest_of_manifest,
    })
}

fn layer(image: &Image<'_>) -> Result<Vec<u8>> {
    let files = image
        .files
        .iter()
        .map(|(path, file)| (path.as_str(), file.content.as_slice(), file.mode));
    tar_of(files, image.seconds)
}

/// A tar of files, with the folders that they are in, in the order of their paths.
fn tar_of<'a>(files: impl Iterator<Item = (&'a str, &'a [u8], u32)>, seconds: u64) -> Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut made = BTreeSet::new();
    for (path, content, mode) in files {
        for (end, _) in path.match_indices('/') {
            let folder = path[..=end].to_owned();
            if made.insert(folder.clone()) {
                let mut header = header(0, 0o755, seconds);
                header.set_entry_type(tar::EntryType::Directory);
                builder.append_data(&mut header, folder, [].as_slice())?;
            }
        }
        let mut header = header(content.len() as u64, mode, seconds);
        builder.append_data(&mut header, path, content)?;
    }
    Ok(builder.into_inner()?)
}

fn header(size: u64, mode: u32, seconds: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(mode);
    header.set_mtime(seconds);
    header.set_uid(0);
    header.set_gid(0);
    header
}

fn compress(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut packed = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
    packed.write_all(bytes)?;
    Ok(packed.finish()?)
}

fn descriptor(media_type: &str, blob: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": digest(blob), "size": blob.len() })
}

fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    hash.iter()
        .fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

/// Seconds since 1970 as RFC 3339 writes them, in UTC.
pub fn rfc3339(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Howard Hinnant's days_from_civil, the other way round: years that begin in March.
    let days = days + 719_468;
    let era = days / 146_097;
    let of_era = days % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn example() -> Image<'static> {
        Image {
            architecture: "amd64",
            reference: "localhost/dataplane:1".to_owned(),
            tag: "1",
            entrypoint: vec!["/usr/bin/agent"],
            labels: BTreeMap::from([("org.opencontainers.image.version".to_owned(), "1".to_owned())]),
            seconds: 1_700_000_000,
            files: BTreeMap::from([
                ("usr/bin/agent".to_owned(), File::program(b"\x7fELF".to_vec())),
                ("usr/share/doc/a".to_owned(), File::text(vec![b'a'; 10_000])),
            ]),
        }
    }

    fn unpack(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(archive);
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            assert_eq!(entry.header().mtime().unwrap(), 1_700_000_000);
            let path = entry.path().unwrap().to_string_lossy().into_owned();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            (path, content)
        });
        entries.collect()
    }

    /// The blob that a descriptor names, which has the size and the digest that it says.
    fn blob<'a>(entries: &'a BTreeMap<String, Vec<u8>>, descriptor: &Value) -> &'a [u8] {
        let named = descriptor["digest"].as_str().unwrap();
        let blob = &entries[&format!("blobs/sha256/{}", named.strip_prefix("sha256:").unwrap())];
        assert_eq!(digest(blob), named);
        assert_eq!(Some(blob.len() as u64), descriptor["size"].as_u64());
        blob
    }

    #[test]
    fn every_descriptor_names_a_blob_down_to_the_files() {
        let archive = archive(&example()).unwrap();
        let entries = unpack(&archive.bytes);
        assert_eq!(entries["oci-layout"], br#"{"imageLayoutVersion":"1.0.0"}"#);
        let index: Value = serde_json::from_slice(&entries["index.json"]).unwrap();
        let named = &index["manifests"][0];
        assert_eq!(named["digest"], archive.digest);
        assert_eq!(
            named["annotations"]["io.containerd.image.name"],
            "localhost/dataplane:1"
        );
        let manifest: Value = serde_json::from_slice(blob(&entries, named)).unwrap();
        let config: Value = serde_json::from_slice(blob(&entries, &manifest["config"])).unwrap();
        assert_eq!(
            config["config"]["Labels"]["org.opencontainers.image.version"],
            "1"
        );
        assert_eq!(config["created"], "2023-11-14T22:13:20Z");
        let mut layer = Vec::new();
        let packed = blob(&entries, &manifest["layers"][0]);
        flate2::read::GzDecoder::new(packed)
            .read_to_end(&mut layer)
            .unwrap();
        assert_eq!(config["rootfs"]["diff_ids"][0], digest(&layer));
        let files = unpack(&layer);
        assert_eq!(files["usr/bin/agent"], b"\x7fELF");
        let paths: Vec<&String> = files.keys().collect();
        assert_eq!(
            paths,
            [
                "usr/",
                "usr/bin/",
                "usr/bin/agent",
                "usr/share/",
                "usr/share/doc/",
                "usr/share/doc/a"
            ]
        );
    }

    #[test]
    fn the_same_files_give_the_same_bytes_and_others_another_digest() {
        let one = archive(&example()).unwrap();
        assert_eq!(one.bytes, archive(&example()).unwrap().bytes);
        let mut changed = example();
        changed.files.insert("x".to_owned(), File::text(Vec::new()));
        assert_ne!(one.digest, archive(&changed).unwrap().digest);
    }

    #[test]
    fn times_are_written_as_the_calendar_says() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(seconds), expected);
        }
    }
}
