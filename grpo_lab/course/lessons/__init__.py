"""What only the notebooks need: small worlds that can be enumerated, and the pictures under their sliders."""
