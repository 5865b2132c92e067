"""TextCraft: an item is crafted from recipes, as in ADaPT and AgentGym."""
