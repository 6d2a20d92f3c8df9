"""The only importer of megatron. Import `pivotrl.megatron.device` first: it makes Megatron-Core run without a GPU."""
