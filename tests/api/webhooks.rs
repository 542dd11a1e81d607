//! Webhooks (contract 2.10): what is delivered, in which order, how often, signed by what, and to whom.
