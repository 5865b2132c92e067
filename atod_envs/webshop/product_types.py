"""What the generated shops sell: product types, attributes, options and the words of their texts.

Pure data, in a compact notation that ``read_product_types`` spells out. The invariant: every attribute and option value
reads as it would in a seller's text, and all names of makers are invented.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class ProductType:
    """A type of product.

    Attributes:
        category: the shop's top category.
        query: the plural by which it is searched.
        noun: the name as it stands in titles.
        path: categories, from general to special.
        low: lowest usual price in dollars.
        high: highest usual price in dollars.
        plain: attributes that stand before the name ("long sleeve").
        having: attributes that it comes with ("rubber sole").
        purpose: what or whom it is for ("daily wear").
        options: option name -> values to choose from.
    """

    category: str
    query: str
    noun: str
    path: str
    low: float
    high: float
    plain: tuple[str, ...]
    having: tuple[str, ...]
    purpose: tuple[str, ...]
    options: dict[str, tuple[str, ...]]


_VALUES = {
    "color": "black, white, navy, red, green, grey, pink, purple, yellow, brown, orange, teal, beige, burgundy",
    "finish": "oak, walnut, white, black, cherry, espresso, natural, grey",
    "size": "small, medium, large, x-large, xx-large, 3x-large",
    "shoe size": "6, 7, 8, 9, 10, 11, 12",
    "bed size": "twin, full, queen, king",
    "mat size": "16 x 24 in, 20 x 32 in, 24 x 36 in, 30 x 48 in",
    "flavor name": "vanilla, chocolate, strawberry, lemon, peanut butter, mint, coffee, caramel, mango, cinnamon",
    "tea flavor": "earl grey, jasmine, rooibos, chai, lemon ginger, hibiscus, chamomile",
    "savory flavor": "sea salt, barbecue, jalapeno, cheddar, garlic herb, black pepper, sour cream",
    "scent": "lavender, rose, coconut, vanilla, citrus, eucalyptus, unscented, jasmine",
    "shade": "ivory, sand, honey, caramel, cocoa, espresso",
    "volume": "2 fl oz, 4 fl oz, 8 fl oz, 16 fl oz",
    "pack": "pack of 1, pack of 2, pack of 4, pack of 6, pack of 12",
    "weight": "6 ounce, 12 ounce, 1 pound, 2 pound",
    "length": "3 feet, 6 feet, 10 feet, 15 feet",
    "capacity": "32gb, 64gb, 128gb, 256gb",
    "phone": "iphone 11, iphone 12, iphone 13, galaxy s20, galaxy s21, pixel 6",
    "screen": "10 inch, 13 inch, 15 inch, 17 inch",
    "piece count": "set of 2, set of 4, set of 6",
}

_ATTRIBUTES = {
    "tops": (
        "machine wash, hand wash, long sleeve, short sleeve, slim fit, loose fit, quick drying, moisture wicking",
        "cotton spandex, polyester cotton, button closure, stretch fabric, crew neck, front pockets",
        "daily wear, gym workout, teen girls, teen boys, office wear, summer vacation",
    ),
    "bottoms": (
        "machine wash, hand wash, slim fit, loose fit, high waist, low rise, straight leg, quick drying",
        "cotton spandex, polyester cotton, elastic waist, drawstring closure, stretch fabric, side pockets",
        "daily wear, gym workout, teen girls, teen boys, office wear, summer vacation",
    ),
    "shoes": (
        "slip resistant, open toe, closed toe, water resistant, light weight, wide width",
        "rubber sole, memory foam, leather lining, ankle strap, steel shank, arch support",
        "daily wear, long walks, office wear, summer vacation, wet floors",
    ),
    "skin": (
        "cruelty free, paraben free, fragrance free, long lasting, travel size, alcohol free, oil free",
        "tea tree, coconut oil, hyaluronic acid, vitamin c, shea butter, green tea, aloe vera",
        "sensitive skin, oily skin, dry skin, daily use, busy mornings",
    ),
    "hair": (
        "cruelty free, paraben free, sulfate free, silicone free, travel size, color safe",
        "tea tree, coconut oil, argan oil, shea butter, green tea, aloe vera",
        "dry hair, damaged hair, curly hair, fine hair, oily scalp",
    ),
    "makeup": (
        "cruelty free, paraben free, fragrance free, long lasting, travel size, high quality",
        "vitamin e, coconut oil, soft bristles, matte finish, magnetic case, built in mirror",
        "sensitive skin, evening parties, daily use, stage shows",
    ),
    "audio": (
        "noise cancelling, fast charging, water proof, hands free, long range, light weight",
        "carrying case, stereo sound, deep bass, led display, rechargeable battery, built in microphone",
        "home theater, video calls, outdoor use, car trips, gym workout",
    ),
    "gadgets": (
        "high speed, heavy duty, easy install, water proof, ultra slim, scratch resistant",
        "gold plated, carrying case, metal body, usb port, lifetime warranty, soft lining",
        "home theater, office desks, outdoor use, car trips, night photography",
    ),
    "furniture": (
        "easy assemble, space saving, heavy duty, easy clean, mid century, eco friendly",
        "solid wood, steel frame, storage space, faux leather, tempered glass, padded top",
        "living room, dining room, small kitchens, guest room, home office, patio use",
    ),
    "textiles": (
        "machine washable, easy clean, non slip, eco friendly, super soft, fade resistant",
        "memory foam, cotton lining, fringed edges, double stitching, woven pattern",
        "living room, guest room, small bathrooms, home office, cold nights",
    ),
    "snacks": (
        "gluten free, sugar free, non gmo, dairy free, low carb, plant based, kosher certified, low sodium",
        "natural ingredients, whole grain, resealable bag, real fruit, high protein, organic oats",
        "gift basket, lunch boxes, party tables, morning meals, road trips",
    ),
    "drinks": (
        "sugar free, non gmo, caffeine free, fair trade, low acid, kosher certified",
        "natural ingredients, resealable bag, loose leaves, rich aroma, recyclable tin",
        "gift basket, morning meals, quiet evenings, office kitchens",
    ),
}

_OFFICIAL = {
    ">": "›",
    "Fashion": "Clothing, Shoes & Jewelry",
    "Beauty": "Beauty & Personal Care",
    "Grocery": "Grocery & Gourmet Food",
}
_PRODUCT_TYPES = """
fashion | men's t-shirts | Men's T-Shirt | Fashion > Men > Shirts > T-Shirts | 9 | 35 | tops | color, size
fashion | men's jeans | Men's Jeans | Fashion > Men > Pants > Jeans | 25 | 80 | bottoms | color, size
fashion | men's hoodies | Men's Hoodie | Fashion > Men > Sweaters > Hoodies | 18 | 60 | tops | color, size
fashion | men's shorts | Men's Shorts | Fashion > Men > Pants > Shorts | 12 | 40 | bottoms | color, size
fashion | women's dresses | Women's Dress | Fashion > Women > Dresses > Casual | 18 | 75 | tops | color, size
fashion | women's leggings | Women's Leggings | Fashion > Women > Pants > Leggings | 10 | 45 | bottoms | color, size
fashion | women's blouses | Women's Blouse | Fashion > Women > Shirts > Blouses | 14 | 50 | tops | color, size
fashion | women's cardigans | Women's Cardigan | Fashion > Women > Sweaters > Cardigans | 19 | 65 | tops | color, size
fashion | men's sneakers | Men's Sneakers | Fashion > Men > Shoes > Sneakers | 25 | 95 | shoes | color, shoe size
fashion | women's sandals | Women's Sandals | Fashion > Women > Shoes > Sandals | 15 | 70 | shoes | color, shoe size
fashion | women's boots | Women's Boots | Fashion > Women > Shoes > Boots | 30 | 120 | shoes | color, shoe size
beauty | face moisturizers | Face Moisturizer | Beauty > Skin Care > Face > Moisturizers | 8 | 45 | skin | volume
beauty | shampoos | Shampoo | Beauty > Hair Care > Wash > Shampoos | 6 | 30 | hair | scent, volume
beauty | hair masks | Hair Mask | Beauty > Hair Care > Treatments > Masks | 9 | 38 | hair | scent, volume
beauty | lipsticks | Lipstick | Beauty > Makeup > Lips > Lipstick | 5 | 25 | makeup | color, pack
beauty | foundations | Liquid Foundation | Beauty > Makeup > Face > Foundation | 9 | 40 | makeup | shade
beauty | body lotions | Body Lotion | Beauty > Skin Care > Body > Lotions | 6 | 28 | skin | scent, volume
beauty | face serums | Face Serum | Beauty > Skin Care > Face > Serums | 12 | 60 | skin | volume
beauty | makeup brushes | Makeup Brush Set | Beauty > Tools > Brushes > Sets | 8 | 35 | makeup | color, piece count
beauty | deodorants | Deodorant Stick | Beauty > Personal Care > Deodorants > Sticks | 4 | 18 | skin | scent, pack
beauty | hand soaps | Hand Soap | Beauty > Skin Care > Hands > Soaps | 4 | 20 | skin | scent, pack
electronics | headphones | Bluetooth Headphones | Electronics > Audio > Headphones > Over-Ear | 19 | 150 | audio | color
electronics | earbuds | Wireless Earbuds | Electronics > Audio > Headphones > Earbuds | 15 | 120 | audio | color
electronics | hdmi cables | HDMI Cable | Electronics > Accessories > Cables > HDMI | 6 | 30 | gadgets | length, color
electronics | phone cases | Phone Case | Electronics > Cell Phones > Cases > Basic | 7 | 30 | gadgets | phone, color
electronics | power banks | Power Bank | Electronics > Cell Phones > Power > Portable | 15 | 60 | gadgets | color, pack
electronics | bluetooth speakers | Bluetooth Speaker | Electronics > Audio > Speakers > Portable | 18 | 130 | audio | color
electronics | security cameras | Security Camera | Electronics > Camera > Security > Indoor | 25 | 140 | gadgets | color, pack
electronics | tablets | Tablet | Electronics > Computers > Tablets > Touch | 80 | 400 | gadgets | capacity, color
electronics | laptop sleeves | Laptop Sleeve | Electronics > Computers > Bags > Sleeves | 10 | 40 | gadgets | screen, color
electronics | memory cards | Memory Card | Electronics > Camera > Storage > Cards | 8 | 60 | gadgets | capacity, pack
garden | coffee tables | Coffee Table | Home & Kitchen > Furniture > Living Room > Coffee Tables | 60 | 300 | furniture | finish
garden | bookcases | Bookcase | Home & Kitchen > Furniture > Home Office > Bookcases | 50 | 250 | furniture | finish
garden | bar stools | Bar Stool | Home & Kitchen > Furniture > Dining > Bar Stools | 45 | 220 | furniture | color, piece count
garden | mattresses | Mattress | Home & Kitchen > Furniture > Bedroom > Mattresses | 120 | 700 | textiles | bed size
garden | throw blankets | Throw Blanket | Home & Kitchen > Bedding > Blankets > Throws | 15 | 60 | textiles | color, bed size
garden | bath mats | Bath Mat | Home & Kitchen > Bath > Rugs > Mats | 12 | 45 | textiles | color, mat size
garden | curtains | Window Curtains | Home & Kitchen > Decor > Windows > Curtains | 15 | 70 | textiles | color, piece count
garden | storage baskets | Storage Basket | Home & Kitchen > Storage > Baskets > Woven | 14 | 55 | textiles | color, piece count
garden | table lamps | Table Lamp | Home & Kitchen > Lighting > Lamps > Table | 20 | 110 | furniture | color, piece count
garden | ottomans | Ottoman Bench | Home & Kitchen > Furniture > Living Room > Ottomans | 40 | 180 | furniture | color
grocery | protein bars | Protein Bars | Grocery > Snacks > Bars > Protein | 10 | 40 | snacks | flavor name, pack
grocery | granolas | Granola | Grocery > Breakfast > Cereal > Granola | 5 | 25 | snacks | flavor name, weight
grocery | herbal teas | Herbal Tea | Grocery > Beverages > Tea > Herbal | 5 | 28 | drinks | tea flavor, pack
grocery | potato chips | Potato Chips | Grocery > Snacks > Chips > Potato | 4 | 22 | snacks | savory flavor, pack
grocery | ground coffees | Ground Coffee | Grocery > Beverages > Coffee > Ground | 8 | 35 | drinks | flavor name, weight
grocery | crackers | Crackers | Grocery > Snacks > Crackers > Crisp | 4 | 20 | snacks | savory flavor, weight
grocery | nut butters | Almond Butter | Grocery > Pantry > Spreads > Nut Butter | 7 | 28 | snacks | flavor name, weight
grocery | popcorn | Popcorn | Grocery > Snacks > Popcorn > Popped | 4 | 20 | snacks | savory flavor, pack
grocery | baking mixes | Pancake Mix | Grocery > Baking > Mixes > Pancake | 5 | 22 | snacks | flavor name, weight
grocery | fruit snacks | Fruit Snacks | Grocery > Snacks > Fruit > Chews | 6 | 26 | snacks | flavor name, pack
"""

MAKER_STARTS = tuple("Bel Nor Kav Tri Mon Sel Ard Pel Vin Lor Cas Dun Fer Gal Hol Jas Kel Mer Oro Ras".split())  # noqa: SIM905
MAKER_MIDDLES = tuple("a e i o ar en il or un ess".split())  # noqa: SIM905
MAKER_ENDS = tuple("ton well mora vale dine ric lux ford ska bury wyn dora nix peak".split())  # noqa: SIM905

REVIEW_TITLES = {
    5: ("Love it", "Exactly as described", "Would buy again"),
    4: ("Good value", "Nice, with one wish", "Pretty happy"),
    3: ("It is okay", "Does the job"),
    2: ("Expected more", "Not for me"),
    1: ("Sent it back",),
}
REVIEW_BODIES = {
    5: (
        "My whole family uses this {noun}.",
        "The {option} one looks even better in person.",
        "Arrived early and works.",
    ),
    4: ("Good {noun}, the box was dented.", "Happy with it, delivery took a week."),
    3: ("An average {noun} for the price.", "Not bad, not great."),
    2: ("The {noun} is smaller than I thought.", "The color differs from the picture."),
    1: ("It broke in the first week.",),
}


@lru_cache(maxsize=1)
def read_product_types() -> tuple[ProductType, ...]:
    """The product types, spelled out."""
    product_types = []
    for line in _PRODUCT_TYPES.strip().splitlines():
        category, query, noun, path, low, high, attributes, options = (field.strip() for field in line.split("|"))
        plain, having, purpose = (_split(text) for text in _ATTRIBUTES[attributes])
        # Options are shown under their official names: "shoe size" draws other values, but is a size.
        values = {_shown_name(name): _split(_VALUES[name]) for name in _split(options)}
        for short, official in _OFFICIAL.items():
            path = path.replace(short, official)
        product_types.append(
            ProductType(category, query, noun, path, float(low), float(high), plain, having, purpose, values)
        )
    return tuple(product_types)


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _shown_name(name: str) -> str:
    if name in ("tea flavor", "savory flavor"):
        return "flavor name"
    if name in ("shoe size", "bed size", "mat size", "volume", "pack", "weight", "length", "piece count", "screen"):
        return "size"
    return {"finish": "color", "shade": "color", "phone": "style", "capacity": "size"}.get(name, name)
