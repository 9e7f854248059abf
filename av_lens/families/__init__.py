"""All that is one model family's own, a file each; weights become a TransformerBridge whose every hook is real."""
