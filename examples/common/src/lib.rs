//! What the examples of this project share.
//!
//! | module | what it does |
//! |---|---|
//! | [`config`], [`rope_scaling`] | `config.json` of a model folder |
//! | [`checkpoint`] | tensors of one or more safetensors files, as f32 |
//! | [`linear`], [`ops`] | matrix product, norm, activation, cross entropy |
//! | [`model`] | weights of a Llama model |
//! | [`forward`] | the forward pass on the processor, around attention that the caller supplies |
//! | [`device`] | the device that attention runs on |
//! | [`random`] | numbers of a seed |
//! | [`text`] | the text to read |
//! | [`plot`] | colours, fonts, SVG and PNG |
//! | [`terminal`] | progress and output |
//! | [`error`] | what can go wrong |

pub mod checkpoint;
pub mod config;
pub mod device;
pub mod error;
pub mod forward;
pub mod linear;
pub mod model;
pub mod ops;
pub mod plot;
pub mod random;
pub mod rope_scaling;
pub mod terminal;
pub mod text;
