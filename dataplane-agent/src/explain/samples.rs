//! Objects for tests.

use serde_json::{Value, json};

use crate::{
    decode::{Decoded, decode},
    model::{Index, Name, Service},
};

/// What an agent on node n1 knows of these objects.
pub fn index(objects: &[Value]) -> Index {
    let mut index = Index::new("n1");
    for object in objects {
        let Decoded::Object { object, .. } = decode(object) else {
            panic!("not an object: {object}");
        };
        index.apply(object);
    }
    index
}

/// The object of a Service in the namespace `shop`.
pub fn service(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "shop", "name": name}, "spec": spec,
    })
}

/// One of the Services of an index.
pub fn known(index: &Index, name: &str) -> Service {
    index.service(&Name::new("shop", name)).unwrap()
}
